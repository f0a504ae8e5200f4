"""The command of `jobs/finetune.py`: tokenize rows, train a LoRA adapter on Ray workers."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.on_ray.training_run import (
    PATHS,
    TRAINING_OPTIONS,
    claimed_output,
    print_report,
    start_workers,
    tokenize,
    train_in,
    write_manifest,
)
from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import absolute_corpus
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.model.checkpoint import ADAPTER_FOLDER_NAME
from selectmoe.paths import model_or_embedded

if TYPE_CHECKING:  # these load torch, and --help must not wait for it
    from transformers import PreTrainedTokenizerBase

    from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

OPTIONS = {"--data": "dataset.data_path", "--merge": "merge", **TRAINING_OPTIONS}


def main(arguments: Sequence[str]) -> None:
    """One run of stage 3. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    tokenizer = require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs.on_ray.training import storage_of
    from selectmoe.finetune.supervised_data import prepare_supervised_rows

    with claimed_output(config, changeable=("merge",)) as output:
        config = start_workers(train_adapter, config, purpose="finetuning")
        summary = tokenize(partial(prepare_supervised_rows, config, tokenizer, output))
        report = train_in(output, train_adapter, config)
        folder, name = storage_of(output, config.scaling.storage_path)
        report["checkpoint"] = f"{folder}/{name}/{report['checkpoint']}"
        report["adapter"] = str(output / ADAPTER_FOLDER_NAME)
        if config.merge:
            report["merged"] = export_merged(config, output)
        seconds = time.perf_counter() - started
        write_manifest(config, output, summary, report, wall_seconds=seconds)
    print_report(
        summary,
        ("loss", f"{report['loss']:.4f} at the end"),
        ("adapter", report["adapter"]),
        *([("merged", report["merged"])] if config.merge else []),
        num_trained=report["num_trained_parameters"],
        num_steps=report["num_steps"],
        wall_seconds=seconds,
    )


def parse(arguments: Sequence[str]) -> FinetuneConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    paths = {"dataset.data_path": absolute_corpus, **PATHS}
    prog = "jobs/finetune.py"
    return parse_config(FinetuneConfig, arguments, prog=prog, options=OPTIONS, paths=paths)


def require_inputs(config: FinetuneConfig) -> "PreTrainedTokenizerBase":
    """Refuses data, a model or target modules that do not exist before Ray starts or a folder is
    made; returns the model's tokenizer."""
    from selectmoe.model.checkpoint import read_model_config

    model = model_or_embedded(config.model, config.revision)
    read_model_config(model)

    from selectmoe.finetune.sources import require_source
    from selectmoe.finetune.supervised_data import load_target_tokenizer
    from selectmoe.training.lora_targets import find_targets
    from selectmoe.training.memory_estimate import skeleton

    require_source(config.dataset)
    find_targets(skeleton(model), config.training.lora, model_name=model)
    return load_target_tokenizer(config)


def train_adapter(config: FinetuneConfig, worker: "TrainingWorker") -> dict[str, Any]:
    """Stage 3 on one of Ray's workers, on the rows that the job has tokenized."""
    from selectmoe.finetune.stage import finetune
    from selectmoe.finetune.supervised_data import load_target_tokenizer
    from selectmoe.training.failures import naming_the_remedy

    remedy = "lower training.batch_size, or set training.gradient_checkpointing=true"
    with naming_the_remedy(remedy):
        report = asdict(finetune(config, load_target_tokenizer(config), worker))
    return report | worker.computes_in(config.training.dtype)


def export_merged(config: FinetuneConfig, output: Path) -> str:
    """Writes the merged model on a node of the cluster, since the driver's may be small; returns
    its folder."""
    import ray

    from jobs.on_ray.map_items import result_of

    logger.info("merging the adapter into the base model")
    merge: Any = ray.remote(max_retries=0)(cast("Any", merge_on_worker))
    return str(result_of(merge.remote(config, output)))


def merge_on_worker(config: FinetuneConfig, output: Path) -> str:
    """The Ray task of `export_merged`."""
    from selectmoe.finetune.exports import merge_into_base

    return str(merge_into_base(config, output))
