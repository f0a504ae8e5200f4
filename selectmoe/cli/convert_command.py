"""`selectmoe convert` and `jobs/convert.py`: convert, verify, print and save the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import format_table, parse_config
from selectmoe.cli.output_folder import absolute_model, absolute_path
from selectmoe.config.conversion import ConvertConfig
from selectmoe.errors import ConfigError

if TYPE_CHECKING:  # these load torch, and --help must not wait for it
    from selectmoe.model.conversion import Conversion
    from selectmoe.model.parity import ParityReport

OPTIONS = {
    "--base": "base",
    "--save-path": "save_path",
    "--verify": "verify",
    "--verify-only": "verify_only",
    "--seed": "seed",
}
PATHS = {"base": absolute_model, "save_path": absolute_path}
GATE_SETTINGS = (
    "quality_gate_init_mean",
    "quality_gate_init_std",
    "quality_gate_init_bias",
    "quality_gate_forced_open",
    "trash_expert_mode",
)
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

    from selectmoe.model.checkpoint import require_olmoe

    require_olmoe(config.base)  # before torch is imported, which takes seconds
    if not config.verify_only:
        from selectmoe.model.conversion import convert_olmoe

        settings = {key: getattr(config, key) for key in GATE_SETTINGS}
        given = {key: value for key, value in settings.items() if value is not None}
        print_conversion(convert_olmoe(config.base, config.save_path, seed=config.seed, **given))
    if config.verify or config.verify_only:
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
