"""What `jobs/pretrain.py` does: train the gates on Ray's workers, follow them, report."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.on_ray.training_run import print_rows, show_metrics, train_in, write_manifest
from selectmoe.cli.command_line import parse_arguments, stage_parser
from selectmoe.cli.output_folder import (
    absolute_corpus,
    absolute_model,
    absolute_path,
    absolute_unless_url,
    claim_run,
    values_given,
)
from selectmoe.cli.progress import RowsProgress, format_seconds
from selectmoe.config.loading import load_config
from selectmoe.config.warmup import WarmupConfig
from selectmoe.warmup.settings import corpus_specs, corruption_kinds

logger = logging.getLogger(__name__)

OPTIONS = {
    "--data": "dataset.paths",
    "--model": "model",
    "--output": "output",
    "--num-workers": "scaling.num_workers",
    "--resume": "resume",
}
# These change where, how fast and on how many workers a run goes on, not what comes out of it.
FREE_ON_RESUME = (
    "output", "output_root", "resume", "training.batch_size", "training.max_tokens_per_batch",
    "training.strategy", "scaling.num_workers", "scaling.use_gpu", "scaling.num_cpus_per_worker",
    "scaling.max_failures", "scaling.num_checkpoints", "scaling.wait_for_nodes",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """One run of stage 1. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs.stage_1_pretrain.gate_worker import TOKENIZED_NAME, warm_up

    output = claim_output(config)
    tokenise(config, output, output / TOKENIZED_NAME)
    report = train_in(output, warm_up, config, show=shows_steps(config.training.num_steps))
    write_manifest(config, output, report, wall_seconds=time.perf_counter() - started)
    print_report(report, wall_seconds=time.perf_counter() - started)


def parse(arguments: Sequence[str]) -> WarmupConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    description = "Stage 1: train the quality gates of a Select-MoE (gate warm-up)."
    parser = stage_parser("jobs/pretrain.py", description, WarmupConfig, OPTIONS)
    options, overrides = parse_arguments(parser, arguments)
    values = values_given(vars(options))
    config = load_config(WarmupConfig, overrides, values=values)
    has_preset = any(override.startswith("preset=") for override in overrides)
    if is_demo(config) and "resume" not in values and not has_preset:
        config = load_config(WarmupConfig, ["preset=demo", *overrides], values=values)
    return with_absolute_paths(config)


def is_demo(config: WarmupConfig) -> bool:
    """True where neither a model nor a corpus is given; the defaults, meant for real ones, would
    keep the tiny selector busy for long with a handful of rows."""
    return config.model is None and not (config.dataset.paths or config.dataset.names)


def with_absolute_paths(config: WarmupConfig) -> WarmupConfig:
    """Workers may run in another directory than the driver, so no path stays relative."""
    dataset, scaling = config.dataset, config.scaling
    paths = tuple(absolute_corpus(path, "--data") for path in dataset.paths)
    folder, storage = dataset.folder, scaling.storage_path
    if folder is not None:
        folder = str(absolute_path(folder, "dataset.folder"))
    if storage is not None:
        storage = absolute_unless_url(storage, "scaling.storage_path")
    return dataclasses.replace(
        config,
        model=config.model and absolute_model(config.model, "--model"),
        dataset=dataclasses.replace(dataset, paths=paths, folder=folder),
        scaling=dataclasses.replace(scaling, storage_path=storage),
    )


def require_inputs(config: WarmupConfig) -> None:
    """Refuses a model or a corpus that is not there before Ray starts or a folder is made."""
    from selectmoe.data.readers import require_readable
    from selectmoe.model.checkpoint import require_select_moe

    corruption_kinds(config.training)
    if config.model is not None:
        require_select_moe(config.model)
    require_readable(corpus_specs(config.dataset))


def claim_output(config: WarmupConfig) -> Path:
    return claim_run(config, free=FREE_ON_RESUME, resume=config.resume is not None)


def tokenise(config: WarmupConfig, output: Path, folder: Path) -> None:
    """Here rather than on a worker: once for all of them, and the progress is to be seen."""
    from selectmoe.warmup.cache import prepare_warmup_rows

    summary = prepare_warmup_rows(config, output, folder, on_progress=RowsProgress("tokenising"))
    if not summary.has_chat_template:
        logger.warning("the tokenizer has no chat template: a plain one is used, as by stage 2")
    logger.info(
        "%s samples with %s tokens; %s truncated, %s rejected",
        f"{summary.num_samples:,}",
        f"{summary.num_tokens:,}",
        f"{summary.num_truncated:,}",
        f"{summary.num_rejected:,}",
    )


def shows_steps(num_steps: int) -> Callable[[Mapping[str, Any]], None]:
    """Shows a line of metrics, and what follows the last one, which is to be heard of only when it
    is done."""

    def show(row: Mapping[str, Any]) -> None:
        show_metrics(row)
        if row["step"] == num_steps:
            logger.info("calibrating: scoring rows of the corpus with the new gates")

    return show


def print_report(report: Mapping[str, Any], *, wall_seconds: float) -> None:
    calibration = report["calibration"]
    rows = (
        ("samples", f"{report['num_samples']:,} ({report['num_rejected']:,} rows rejected)"),
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
