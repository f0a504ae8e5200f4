"""`selectmoe info`: prints installed versions, or describes a selector."""

import json
from collections.abc import Sequence
from importlib.util import find_spec

from selectmoe.cli.command_line import CommandParser
from selectmoe.config.code_version import library_versions
from selectmoe.errors import ConfigError

# One module of each extra tells whether it is installed.
EXTRAS = {
    "ray": "ray",
    "hub": "datasets",
    "train": "peft",
    "eval": "lm_eval",
    "serve": "fastapi",
    "gguf": "gguf",
    "client": "httpx",
    "report": "matplotlib",
    "fit": "sklearn",
    "s3": "s3fs",
    "gcs": "gcsfs",
}
PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "ray", "datasets", "peft", "lm_eval")


def main(arguments: Sequence[str]) -> None:
    """Raises SelectMoeError where --model is no selector."""
    parser = CommandParser(
        prog="selectmoe info", description="Describe this installation, or a selector."
    )
    parser.add_argument("--model", help="Select-MoE, selector folder or base to describe.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--model-checkpoint-path", help="Stage 1's weights, or the selector folder of a base."
    )
    options = parser.parse_args(list(arguments))
    model, checkpoint = options.model, options.model_checkpoint_path
    if model is None and checkpoint is not None:
        raise ConfigError("--model-checkpoint-path needs --model")
    facts = installation() if model is None else selector(model, checkpoint)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


def installation() -> dict[str, str]:
    """Versions and extras, without importing anything heavy."""
    versions = library_versions(PACKAGES)
    facts = {library: number or "not installed" for library, number in versions.items()}
    missing = [extra for extra, module in EXTRAS.items() if find_spec(module) is None]
    facts["extras installed"] = ", ".join(extra for extra in EXTRAS if extra not in missing)
    if missing:
        facts["extras missing"] = f"{', '.join(missing)}: pip install 'selectmoe[{missing[0]}]'"
    return facts


def selector(model: str, checkpoint: str | None = None) -> dict[str, object]:
    """What config.json, the gates and the calibration of a selector say."""
    from selectmoe.model.checkpoint import read_model_config
    from selectmoe.model.selector_files import find_selector
    from selectmoe.scoring.calibration import load_calibration

    files = find_selector(model, checkpoint)
    files.require_readable()
    config = read_model_config(str(files.model_path()))
    calibration = load_calibration(files.calibration_folder())
    keys = (
        "model_type", "num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok",
        "vocab_size", "max_position_embeddings", "trash_expert_mode", "quality_loss_type",
    )  # fmt: skip
    facts = {"model": model, **files.facts()} | {k: config[k] for k in keys if k in config}
    facts["weights_sha256"] = files.weights_hash()
    facts["calibration"] = (
        f"{calibration.num_samples:,} samples, formula {calibration.formula}"
        if calibration
        else "none: scores have no percentiles"
    )
    return facts
