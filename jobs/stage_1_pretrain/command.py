"""The command of `jobs/pretrain.py`: tokenize rows, train the gates on Ray workers, calibrate."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.on_ray.training_run import (
    PATHS,
    TRAINING_OPTIONS,
    claimed_output,
    print_report,
    show_metrics,
    start_workers,
    tokenize,
    train_in,
    write_manifest,
)
from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import absolute_corpus, absolute_path
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import SelectMoeError
from selectmoe.warmup.settings import (
    corruption_kinds,
    require_select_moe_settings,
    uses_features,
)

if TYPE_CHECKING:  # --help and a mistyped option must not wait for this import
    from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

OPTIONS = {"--data": "dataset.paths", **TRAINING_OPTIONS}
CHANGEABLE_ON_RESUME = ("training.batch_size", "training.max_tokens_per_batch", "training.strategy")


def main(arguments: Sequence[str]) -> None:
    """One run of stage 1. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer

    with claimed_output(config, changeable=CHANGEABLE_ON_RESUME) as output:
        config = start_workers(warm_up, config, purpose="warm-up")
        chat = warmup_tokenizer(config)
        if chat.tokenizer.chat_template is None:
            logger.warning(
                "the tokenizer has no chat template: the package's is used, as by stage 2"
            )
        summary = tokenize(partial(prepare_warmup_rows, config, chat, output))
        report = train_in(output, warm_up, config, show=shows_steps(config.training.num_steps))
        seconds = time.perf_counter() - started
        write_manifest(config, output, summary, report, wall_seconds=seconds)
    print_report(
        summary,
        *gates_lines(report),
        ("scores", calibration_line(report)),
        ("weights", report["weights"]),
        num_trained=report["num_parameters_trained"],
        num_steps=report.get("num_steps"),
        wall_seconds=seconds,
    )


def parse(arguments: Sequence[str]) -> WarmupConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    paths = {"dataset.paths": absolute_corpus, "dataset.folder": absolute_path, **PATHS}
    prog = "jobs/pretrain.py"
    config = parse_config(WarmupConfig, arguments, prog=prog, options=OPTIONS, paths=paths)
    has_preset = any(argument.startswith("preset=") for argument in arguments)
    if is_demo(config) and config.resume is None and not has_preset:
        return parse(["preset=demo", *arguments])
    return config


def is_demo(config: WarmupConfig) -> bool:
    """True where neither a model nor a corpus is given: the defaults suit real ones, and would
    train the tiny selector for long on a few rows."""
    return config.model is None and not (config.dataset.paths or config.dataset.names)


def require_inputs(config: WarmupConfig) -> None:
    """Refuses a model or a corpus that does not exist before Ray starts or a folder is made."""
    from selectmoe.data.named_corpora import corpus_specs
    from selectmoe.data.readers import require_readable
    from selectmoe.model.checkpoint import require_select_moe
    from selectmoe.model.weight_checks import require_weights
    from selectmoe.paths import model_or_embedded
    from selectmoe.warmup.base_model import is_base, require_base

    corruption_kinds(config.training)
    model = model_or_embedded(config.model, config.revision)
    if is_base(model):
        require_base(model, config.training)
    else:
        require_select_moe_settings(config.training)
        require_select_moe(model)
    require_weights(model)
    require_readable(corpus_specs(config.dataset))


def shows_steps(num_steps: int) -> Callable[[Mapping[str, Any]], None]:
    """Logs a row of metrics, and after the last one that the calibration has begun, which reports
    nothing until it ends."""

    def show(row: Mapping[str, Any]) -> None:
        show_metrics(row)
        if row.get("step") == num_steps:
            logger.info("calibrating: scoring rows of the corpus with the trained gates")

    return show


def gates_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is told of gates on a base."""
    if "layers" not in report:
        return []
    layers = ", ".join(map(str, report["layers"]))
    return [
        ("copies", f"{report['num_copies']:,}"),
        ("gates", f"on the layers {layers}, fitted in {report['fit_seconds']:.1f} s"),
        ("AUROC", f"{report['held_out_auroc']:.3f} of held-out rows against corrupted copies"),
    ]


def calibration_line(report: Mapping[str, Any]) -> str:
    if report["calibration"] is None:
        return f"not calibrated: {report['calibration_failure']}"
    return f"calibrated on {report['calibration']['num_samples']:,} rows of the corpus"


def warm_up(config: WarmupConfig, worker: "TrainingWorker") -> dict[str, Any]:
    """Stage 1 on one of Ray's workers; rank 0 writes into the run's folder.

    Rank 0 alone calibrates: after the last step no worker waits for another, and the weights that
    it has written are those of all.
    """
    from selectmoe.paths import model_or_embedded
    from selectmoe.training.failures import naming_the_remedy
    from selectmoe.warmup.base_model import is_base
    from selectmoe.warmup.base_stage import run_base_steps, run_base_warmup
    from selectmoe.warmup.stage import run_warmup

    device = worker.computes_in(config.training.dtype)

    with naming_the_remedy("lower training.max_tokens_per_batch or training.batch_size"):
        on_base = is_base(model_or_embedded(config.model, config.revision))
        if on_base and uses_features(config.training):
            fitted = run_base_warmup(config, worker)  # calibrates, too, from what it has computed
            return asdict(fitted) | device if fitted else device
        run = run_base_steps if on_base else run_warmup
        report = asdict(run(config, worker)) | device
    return report if worker.rank > 0 else report | calibrate(config, worker, report["weights"])


def calibrate(config: WarmupConfig, worker: "TrainingWorker", weights: str) -> dict[str, Any]:
    """What the report says of the calibration. Weights that cannot be scored with are kept, and
    their warm-up is not repeated: stage 2 would fail with the same error."""
    from selectmoe.scoring.calibration import describe
    from selectmoe.warmup.calibration import calibrate_warmup

    try:
        calibration = calibrate_warmup(config, worker, weights=weights)
    except SelectMoeError as error:
        return {"calibration": None, "calibration_failure": str(error)}
    return {"calibration": describe(calibration)}
