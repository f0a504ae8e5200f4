"""What `jobs/pretrain.py` does: train the gates on Ray's workers, follow them, report."""

import argparse
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.command_line import CommandParser, parse_arguments
from jobs.output_folder import (
    absolute_path,
    claim_output_folder,
    new_output_folder,
    saved_settings,
)
from jobs.progress import format_seconds
from selectmoe.config import WarmupConfig
from selectmoe.config_loading import load_config, resolved, settings_help
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.training.warmup_settings import corpus_specs, corruption_kinds

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
# These change where, how fast and on how many workers a run goes on, not what comes out of it.
FREE_ON_RESUME = (
    "output", "output_root", "resume", "training.max_tokens_per_forward",
    "training.strategy", "scaling.num_workers", "scaling.use_gpu", "scaling.num_cpus_per_worker",
    "scaling.max_failures", "scaling.num_checkpoints", "scaling.wait_for_nodes",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """One run of stage 1. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs import gate_worker, ray_training
    from jobs.ray_session import start_ray

    output = claim_output(config)
    start_ray(ray_training, gate_worker)
    try:
        report = ray_training.train_on_ray(
            gate_worker.warm_up,
            dataclasses.replace(config, output=str(output)),
            output=output,
            scaling=config.scaling,
            show=show_metrics,
        )
    except KeyboardInterrupt:
        logger.info("go on with --resume %s", output)
        raise
    assert isinstance(report, dict)
    write_manifest(config, output, report, wall_seconds=time.perf_counter() - started)
    print_report(report, wall_seconds=time.perf_counter() - started)


def parse(arguments: Sequence[str]) -> WarmupConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    options, overrides = parse_arguments(build_parser(), arguments)
    given = {
        "dataset.paths": options.data,
        "model": options.model,
        "output": options.output,
        "scaling.num_workers": options.num_workers,
        "resume": options.resume,
    }
    values = {key: value for key, value in given.items() if value is not None}
    if options.resume is not None:
        folder = absolute_path(options.resume, "resume")
        values = {**saved_settings(folder), **values, "output": str(folder)}
    config = load_config(WarmupConfig, overrides, values=values)
    has_preset = any(override.startswith("preset=") for override in overrides)
    if is_demo(config) and options.resume is None and not has_preset:
        config = load_config(WarmupConfig, ["preset=demo", *overrides], values=values)
    return with_absolute_paths(config)


def is_demo(config: WarmupConfig) -> bool:
    """True where neither a model nor a corpus is given; the defaults, meant for real ones, would
    keep the tiny selector busy for long with a handful of rows."""
    return config.model is None and not (config.dataset.paths or config.dataset.names)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="jobs/pretrain.py",
        description="Stage 1: warm up the quality gates of a Select-MoE.",
        epilog="settings:\n" + settings_help(WarmupConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", nargs="+", help="corpora: files, folders, globs, URLs or hub:NAME[:split]"
    )
    parser.add_argument("--model", help="Select-MoE folder or hub name")
    parser.add_argument("--output", metavar="DIR", help="folder of this run")
    parser.add_argument("--num-workers", type=int, help="training processes")
    parser.add_argument("--resume", metavar="DIR", help="go on with the interrupted run in DIR")
    return parser


def with_absolute_paths(config: WarmupConfig) -> WarmupConfig:
    """Workers may run in another directory than the driver, so no path stays relative."""
    dataset, scaling = config.dataset, config.scaling
    paths = tuple(
        path if path.startswith("hub:") or "://" in path else str(absolute_path(path, "--data"))
        for path in dataset.paths
    )
    folder, storage = dataset.folder, scaling.storage_path
    if folder is not None:
        folder = str(absolute_path(folder, "dataset.folder"))
    if storage is not None and "://" not in storage:
        storage = str(absolute_path(storage, "scaling.storage_path"))
    model = config.model
    if model is not None and Path(model).expanduser().is_dir():
        model = str(absolute_path(model, "--model"))
    return dataclasses.replace(
        config,
        model=model,
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
    """The run's folder, claimed by its settings."""
    output = new_output_folder(config.stage, output=config.output, output_root=config.output_root)
    settings = {k: v for k, v in resolved(config).items() if k not in FREE_ON_RESUME}
    claim_output_folder(output, settings, resume=config.resume is not None)
    logger.info("output: %s", output)
    return output


def show_metrics(row: Mapping[str, Any]) -> None:
    from selectmoe.training.metrics_lines import metrics_line

    logger.info("%s", metrics_line(row))


def write_manifest(
    config: WarmupConfig, output: Path, report: Mapping[str, Any], *, wall_seconds: float
) -> None:
    """Writes `manifest.json`, last of all files: where it is, the run is complete."""
    from selectmoe import __version__
    from selectmoe.data.writers import write_json
    from selectmoe.model.checkpoint import hash_weights

    model = config.model or str(EMBEDDED_SELECTOR)
    manifest = {
        "selectmoe_version": __version__,
        "config": resolved(config),
        "model": model,
        "model_sha256": hash_weights(model, None),
        **report,
        "wall_seconds": round(wall_seconds, 3),
    }
    write_json(output / MANIFEST_NAME, manifest)


def print_report(report: Mapping[str, Any], *, wall_seconds: float) -> None:
    rows = (
        ("samples", f"{report['num_samples']:,} ({report['num_rejected']:,} rows rejected)"),
        ("trained", f"{report['num_parameters_trained']:,} parameters"),
        ("steps", f"{report['num_steps']:,} in {format_seconds(wall_seconds)}"),
        ("weights", report["weights"]),
    )
    for label, value in rows:
        print(f"{label:<8} {value}")
