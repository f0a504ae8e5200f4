"""The steps of a run of stage 1 or 3: tokenize, train on Ray, write the manifest, report."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from selectmoe.cli.output_folder import (
    absolute_model,
    absolute_unless_url,
    claimed_run,
)
from selectmoe.cli.progress import RowsProgress, format_seconds
from selectmoe.config.code_version import code_version
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import resolved
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import ConfigError
from selectmoe.paths import model_or_embedded

if TYPE_CHECKING:  # it loads transformers, and --help must not wait for it
    from selectmoe.training.tokenized_rows import TokenizedSummary
    from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

Config = TypeVar("Config", WarmupConfig, FinetuneConfig)

MANIFEST_NAME = "manifest.json"
TRAINING_OPTIONS = {
    "--model": "model",
    "--output": "output",
    "--num-workers": "scaling.num_workers",
    "--resume": "resume",
}
PATHS = {"model": absolute_model, "scaling.storage_path": absolute_unless_url}
# Where a run is written; config.json lies there.
FREE_ON_RESUME = ("output", "output_root", "resume")
# Settings that a resumed run keeps unless it is given others: they decide where, how fast and on
# which workers it trains, not what it learns.
CHANGEABLE_ON_RESUME = (
    "max_rejected", "scaling.num_workers", "scaling.use_gpu", "scaling.num_cpus_per_worker",
    "scaling.max_failures", "scaling.num_checkpoints", "scaling.wait_for_nodes",
)  # fmt: skip


def claimed_output(
    config: WarmupConfig | FinetuneConfig, *, changeable: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Path]:
    """The folder of the run, locked until the block ends. changeable: settings that may change on
    resume, besides the above."""
    return claimed_run(
        config,
        free=FREE_ON_RESUME,
        changeable=(*CHANGEABLE_ON_RESUME, *changeable),
        resume=config.resume is not None,
    )


def start_workers(
    train: "Callable[[Any, TrainingWorker], dict[str, Any]]",
    config: Config,
    *,
    purpose: str,
) -> Config:
    """Starts Ray, and refuses a cluster whose workers are too few, have too little memory for the
    weights or a GPU that torch cannot use; before the corpus is read. Returns the configuration
    with its number of workers.

    purpose: "warm-up", for the message.
    """
    from jobs.on_ray import training as ray_training
    from jobs.on_ray.session import alive_nodes, num_free_gpus, start_ray
    from jobs.on_ray.worker_probe import free_memory_of_worker
    from selectmoe.model.checkpoint import cached_folder
    from selectmoe.model.free_memory import require_weights_fit
    from selectmoe.model.weight_checks import count_parameters
    from selectmoe.model.weight_headers import INDEX_NAME, WEIGHTS_NAME

    code_version()  # the manifest names the code that starts, whatever the checkout becomes
    start_ray(ray_training, sys.modules[train.__module__])
    config = with_num_workers(config, num_free_gpus=num_free_gpus())
    scaling, nodes = config.scaling, alive_nodes()
    with_gpu = ray_training.trains_on_gpu(scaling, nodes)
    ray_training.require_workers(scaling, nodes, with_gpu=with_gpu)
    free, kind = free_memory_of_worker(ray_training.worker_resources(scaling, with_gpu=with_gpu))
    if (scaling.num_workers or 1) > 1 and config.training.strategy == "fsdp":
        return config  # each holds a share of the weights
    model = _model_of(config)
    folder = cached_folder(model)
    if folder is None or not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return config  # not downloaded here, or pickles: each worker finds out when it loads them
    num_parameters = count_parameters(str(folder), with_head=True)
    dtype = config.training.dtype or ("bfloat16" if with_gpu else "float32")
    require_weights_fit(num_parameters, dtype, purpose=purpose, free=free, kind=kind)
    return config


def tokenize(prepare: "Callable[..., TokenizedSummary]") -> "TokenizedSummary":
    """Calls `prepare(on_progress=...)`, and says what became of the rows. On the driver rather
    than on a worker: it needs no GPU, and its progress is visible."""
    summary = prepare(on_progress=RowsProgress("tokenizing"))
    logger.info(
        "%s: %s rows with %s tokens, %s of them answers; %s truncated, %s rejected",
        summary.description,
        f"{summary.num_rows:,}",
        f"{summary.num_tokens:,}",
        f"{summary.num_answer_tokens:,}",
        f"{summary.num_truncated:,}",
        f"{sum(summary.num_rejected.values()):,}",
    )
    return summary


def show_metrics(row: Mapping[str, Any]) -> None:
    from selectmoe.training.metrics_lines import metrics_line

    logger.info("%s", metrics_line(row))


def train_in(
    output: Path,
    train: "Callable[[Any, TrainingWorker], dict[str, Any]]",
    config: Config,
    *,
    show: Callable[[Mapping[str, Any]], None] = show_metrics,
) -> dict[str, Any]:
    """Runs `train(config, worker)` on the workers; returns rank 0's report.

    show: called with every row of metrics.
    """
    from jobs.on_ray import training as ray_training

    report = ray_training.train_on_ray(
        train,
        dataclasses.replace(config, output=str(output)),
        output=output,
        scaling=config.scaling,
        show=show,
    )
    assert isinstance(report, dict)
    return report


def with_num_workers(config: Config, *, num_free_gpus: int) -> Config:
    """The configuration with a number of workers: the given one, else a worker for every free GPU,
    or for as many of them as the other settings allow; logs which."""
    if config.scaling.num_workers is not None:
        return config
    usable = 1 if config.scaling.use_gpu is False else max(num_free_gpus, 1)
    for num_workers in range(usable, 1, -1):
        with contextlib.suppress(ConfigError):
            changed = _replace_workers(config, num_workers)
            which = "all" if num_workers == num_free_gpus else f"{num_workers} of the"
            logger.info(
                "training on %s %d free GPUs; --num-workers sets another number",
                which,
                num_free_gpus,
            )
            return changed
    return _replace_workers(config, 1)


def _replace_workers(config: Config, num_workers: int) -> Config:
    scaling = dataclasses.replace(config.scaling, num_workers=num_workers)
    return dataclasses.replace(config, scaling=scaling)


def write_manifest(
    config: WarmupConfig | FinetuneConfig,
    output: Path,
    summary: "TokenizedSummary",
    report: Mapping[str, Any],
    *,
    wall_seconds: float,
) -> None:
    """Writes `manifest.json`, the last file of a run: where it exists, the run is complete. Then
    report.html, which shows what the other files hold."""
    from selectmoe.cli.report_command import report_of_stage
    from selectmoe.data.writers import write_json
    from selectmoe.model.checkpoint import hash_weights

    model = _model_of(config)
    manifest = {
        "code": code_version(),
        "config": resolved(config),
        "model": model,
        "model_sha256": hash_weights(model, None),
        "data": dataclasses.asdict(summary),
        **report,
        "wall_seconds": round(wall_seconds, 3),
    }
    write_json(output / MANIFEST_NAME, manifest)
    report_of_stage(output)


def _model_of(config: WarmupConfig | FinetuneConfig) -> str:
    return model_or_embedded(config.model, config.revision)


def print_report(
    summary: "TokenizedSummary",
    *stage_rows: tuple[str, str],
    num_trained: int,
    num_steps: int | None,
    wall_seconds: float,
) -> None:
    """What the run did; stage_rows: (label, text), below what both stages print. num_steps: None
    where there were no optimizer steps."""
    rejected = sum(summary.num_rejected.values())
    for label, text in (
        ("rows", f"{summary.num_rows:,} ({rejected:,} rejected, {summary.description})"),
        ("trained", f"{num_trained:,} parameters"),
        ("time", format_seconds(wall_seconds))
        if num_steps is None
        else ("steps", f"{num_steps:,} in {format_seconds(wall_seconds)}"),
        *stage_rows,
    ):
        print(f"{label:<8} {text}")
