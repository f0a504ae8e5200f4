"""What `jobs/pretrain.py` does: tokenize the rows, train the gates on Ray's workers, report."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.on_ray.training_run import (
    PATHS,
    claim_output,
    print_rows,
    show_metrics,
    tokenize,
    train_in,
    write_manifest,
)
from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import absolute_corpus, absolute_path
from selectmoe.cli.progress import format_seconds
from selectmoe.config.warmup import WarmupConfig
from selectmoe.warmup.settings import corpus_specs, corruption_kinds

if TYPE_CHECKING:  # it loads transformers, and --help must not wait for it
    from selectmoe.training.tokenized_rows import TokenizedSummary

logger = logging.getLogger(__name__)

OPTIONS = {
    "--data": "dataset.paths",
    "--model": "model",
    "--output": "output",
    "--num-workers": "scaling.num_workers",
    "--resume": "resume",
}
FREE_ON_RESUME = ("training.batch_size", "training.max_tokens_per_batch", "training.strategy")


def main(arguments: Sequence[str]) -> None:
    """One run of stage 1. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs.stage_1_pretrain.gate_worker import warm_up
    from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer

    output = claim_output(config, free=FREE_ON_RESUME)
    chat = warmup_tokenizer(config)
    if chat.tokenizer.chat_template is None:
        logger.warning("the tokenizer has no chat template: the package's is used, as by stage 2")
    summary = tokenize(partial(prepare_warmup_rows, config, chat, output))
    report = train_in(output, warm_up, config, show=shows_steps(config.training.num_steps))
    seconds = time.perf_counter() - started
    write_manifest(config, output, summary, report, wall_seconds=seconds)
    print_report(summary, report, wall_seconds=seconds)


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
    from selectmoe.data.readers import require_readable
    from selectmoe.model.checkpoint import require_select_moe

    corruption_kinds(config.training)
    if config.model is not None:
        require_select_moe(config.model)
    require_readable(corpus_specs(config.dataset))


def shows_steps(num_steps: int) -> Callable[[Mapping[str, Any]], None]:
    """Logs a row of metrics, and after the last one that the calibration has begun, which reports
    nothing until it ends."""

    def show(row: Mapping[str, Any]) -> None:
        show_metrics(row)
        if row["step"] == num_steps:
            logger.info("calibrating: scoring rows of the corpus with the trained gates")

    return show


def print_report(
    summary: "TokenizedSummary", report: Mapping[str, Any], *, wall_seconds: float
) -> None:
    calibration = report["calibration"]
    rejected = sum(summary.num_rejected.values())
    rows = (
        ("rows", f"{summary.num_rows:,} ({rejected:,} rejected, {summary.description})"),
        ("trained", f"{report['num_parameters_trained']:,} parameters"),
        ("steps", f"{report['num_steps']:,} in {format_seconds(wall_seconds)}"),
        (
            "scores",
            f"calibrated on {calibration['num_samples']:,} rows of the corpus"
            if calibration
            else f"not calibrated: {report['calibration_failure']}",
        ),
        ("weights", report["weights"]),
    )
    print_rows(rows)
