"""`selectmoe convert` and `jobs/convert.py`: convert, verify, print and save the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import format_table, parse_config
from selectmoe.cli.output_folder import absolute_model, absolute_path
from selectmoe.config.conversion import ConvertConfig
from selectmoe.errors import ConfigError, NotEnoughMemoryError

if TYPE_CHECKING:  # these load torch, and --help must not wait for it
    from selectmoe.model.conversion import Conversion
    from selectmoe.model.parity import ParityReport

OPTIONS = {
    "--base": "base",
    "--save-path": "save_path",
    "--verify": "verify",
    "--verify-only": "verify_only",
    "--merge-weights": "merge_weights",
    "--remote-code": "remote_code",
    "--push-to-hub": "push_to_hub",
    "--seed": "seed",
}
PATHS = {"base": absolute_model, "save_path": absolute_path, "merge_weights": absolute_path}
GATE_SETTINGS = (
    "quality_gate_init_mean",
    "quality_gate_init_std",
    "quality_gate_init_bias",
    "quality_gate_forced_open",
    "trash_expert_mode",
)
FLOAT32_BYTES = 4
REPORT_NAME = "parity_report.json"
REPORT_ROWS = (
    ("gates forced open: maximum difference of logits", "forced_open_max_difference", ".2g"),
    ("  tolerance", "tolerance", ".2g"),
    ("gates as initialized: maximum difference of logits", "drift_max_difference", ".2g"),
    ("  mean difference of logits", "drift_mean_difference", ".2g"),
    ("  KL divergence, nats per token", "drift_kl_nats_per_token", ".2g"),
    ("  perplexity of the base model", "base_perplexity", ",.2f"),
    ("  perplexity of the Select-MoE model", "perplexity", ",.2f"),
)


def main(arguments: Sequence[str], *, prog: str = "selectmoe convert") -> None:
    """Runs stage 0. Raises SelectMoeError for a mistake of the user."""
    config = parse_config(ConvertConfig, arguments, prog=prog, options=OPTIONS, paths=PATHS)
    require_inputs(config)  # before torch is imported, which takes seconds
    if config.verify or config.verify_only:
        print_memory(config.base)
    if config.merge_weights is not None:
        merge(config)
    elif not config.verify_only:
        convert(config)
    if config.verify or config.verify_only:
        verify(config)
    if config.push_to_hub is not None:
        from selectmoe.model.hub_upload import push_folder

        print(f"uploaded   {push_folder(Path(config.save_path), config.push_to_hub)}", flush=True)


def require_inputs(config: ConvertConfig) -> None:
    """Refuses a base, weights or a repository that cannot be used before the work begins."""
    from selectmoe.model.checkpoint import require_olmoe, weights_file
    from selectmoe.model.hub_upload import require_hub_login

    if config.merge_weights is None:
        require_olmoe(config.base)
    else:
        weights_file(config.merge_weights)
        if settings := gate_settings(config):
            name = next(iter(settings))
            raise ConfigError(
                f"{name} is a setting of new gates, and merge_weights brings trained ones: one of "
                "them must be left out"
            )
    if config.push_to_hub is not None:
        require_hub_login(config.push_to_hub)


def gate_settings(config: ConvertConfig) -> dict[str, object]:
    """The settings of new gates that are given."""
    settings = {key: getattr(config, key) for key in GATE_SETTINGS}
    return {key: value for key, value in settings.items() if value is not None}


def convert(config: ConvertConfig) -> None:
    from selectmoe.model.conversion import convert_olmoe

    conversion = convert_olmoe(
        config.base,
        config.save_path,
        seed=config.seed,
        remote_code=config.remote_code,
        **gate_settings(config),
    )
    print_conversion(conversion)


def merge(config: ConvertConfig) -> None:
    """Writes base and stage 1's weights as one folder, with the calibration of these weights."""
    from selectmoe.model.merging import merge_weights
    from selectmoe.scoring.calibration import carry_over_calibration

    assert config.merge_weights is not None
    merged = merge_weights(
        config.base, config.merge_weights, config.save_path, remote_code=config.remote_code
    )
    print(f"base       {merged.base}: {merged.num_parameters:,} parameters with the gates")
    print(f"merged     {merged.weights}")
    if carry_over_calibration(merged.base, merged.weights, merged.folder):
        print("calibrated as these weights are: percentiles stay the same")
    print(f"saved to   {merged.folder}", flush=True)


def print_memory(base: str) -> None:
    """Prints what verification needs. Raises NotEnoughMemoryError where less is free."""
    from selectmoe.model.checkpoint import model_folder
    from selectmoe.model.free_memory import free_cpu_memory, in_words
    from selectmoe.model.weight_files import num_stored_parameters

    needed = num_stored_parameters(model_folder(base)) * FLOAT32_BYTES
    free = free_cpu_memory()
    print(
        f"memory     verifying needs at least {in_words(needed)} (one of the two models at a time, "
        f"in float32), {in_words(free)} are free",
        flush=True,
    )
    require_memory(base, needed=needed, free=free)


def require_memory(base: str, *, needed: int, free: int) -> None:
    """Raises NotEnoughMemoryError where verification needs more bytes than are free."""
    from selectmoe.model.free_memory import in_words

    if needed > free:
        raise NotEnoughMemoryError(
            f"verifying {base} needs at least {in_words(needed)} of memory, and {in_words(free)} "
            "are free: convert without --verify, and run --verify-only on a larger machine"
        )


def verify(config: ConvertConfig) -> None:
    from selectmoe.model.parity import require_parity, verify_conversion

    report = verify_conversion(config.base, config.save_path)
    file = save_report(report)
    print_report(report, file)
    require_parity(report)


def print_conversion(conversion: "Conversion") -> None:
    c = conversion
    print(f"base       {c.base}: {c.num_layers} layers with {c.num_experts} experts, {c.dtype}")
    print(f"copied     all {c.num_tensors:,} tensors with {c.num_parameters:,} parameters")
    print(f"added      {c.num_layers} quality gates with {c.num_added_parameters:,} parameters")
    print(f"saved to   {c.folder}", flush=True)


def print_report(report: "ParityReport", file: Path) -> None:
    """A table with a column per dtype, and the result."""
    parities = report.by_dtype.values()
    rows = [(f"parity on {report.num_tokens} tokens of text", *report.by_dtype)]
    for label, name, number_format in REPORT_ROWS:
        rows.append((label, *(format(getattr(p, name), number_format) for p in parities)))
    num_equal = report.num_tensors - len(report.different_tensors)
    print(f"\n{format_table(rows)}\n")
    print(f"{num_equal:,} of {report.num_tensors:,} base tensors are bit-identical")
    print(f"parity: {'yes' if report.passed else 'NO'}")
    print(file, flush=True)


def save_report(report: "ParityReport") -> Path:
    """Writes the report into the folder of the converted model."""
    from selectmoe.data.writers import write_json

    file = Path(report.converted) / REPORT_NAME
    try:
        write_json(file, report.to_json())
    except OSError as error:
        raise ConfigError(f"save_path: {file} cannot be written: {error}") from error
    return file
