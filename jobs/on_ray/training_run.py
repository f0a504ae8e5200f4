"""What stages 1 and 3 do alike: train on Ray, show metrics, store and print a report."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe.cli.output_folder import telling_how_to_resume
from selectmoe.config.code_version import code_version
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import resolved
from selectmoe.config.warmup import WarmupConfig
from selectmoe.paths import model_or_embedded

if TYPE_CHECKING:
    from jobs.on_ray.training import TrainingWorker

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"


def show_metrics(row: Mapping[str, Any]) -> None:
    from selectmoe.training.metrics_lines import metrics_line

    logger.info("%s", metrics_line(row))


def train_in(
    output: Path,
    train: "Callable[[Any, TrainingWorker], dict[str, Any]]",
    config: WarmupConfig | FinetuneConfig,
    *,
    show: Callable[[Mapping[str, Any]], None] = show_metrics,
) -> dict[str, Any]:
    """Starts Ray and runs `train(config, worker)` on its workers; returns rank 0's report.

    show: called for every line of metrics.
    """
    from jobs.on_ray import training as ray_training
    from jobs.on_ray.session import start_ray

    code_version()  # the manifest names the code that starts, whatever the checkout becomes
    start_ray(ray_training, sys.modules[train.__module__])
    with telling_how_to_resume(output):
        report = ray_training.train_on_ray(
            train,
            dataclasses.replace(config, output=str(output)),
            output=output,
            scaling=config.scaling,
            show=show,
        )
    assert isinstance(report, dict)
    return report


def write_manifest(
    config: WarmupConfig | FinetuneConfig,
    output: Path,
    report: Mapping[str, Any],
    *,
    wall_seconds: float,
) -> None:
    """Writes `manifest.json`, last of all files: where it is, the run is complete."""
    from selectmoe.data.writers import write_json
    from selectmoe.model.checkpoint import hash_weights

    model = model_or_embedded(config.model)
    manifest = {
        "code": code_version(),
        "config": resolved(config),
        "model": model,
        "model_sha256": hash_weights(model, None),
        **report,
        "wall_seconds": round(wall_seconds, 3),
    }
    write_json(output / MANIFEST_NAME, manifest)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    for label, value in rows:
        print(f"{label:<8} {value}")
