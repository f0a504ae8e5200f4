"""What `jobs/finetune.py` does: tokenize the rows, train an adapter on Ray's workers, report."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.on_ray.training_run import (
    claim_output,
    print_rows,
    tokenize,
    train_in,
    with_absolute_paths,
    write_manifest,
)
from selectmoe.cli.command_line import parse_arguments, stage_parser
from selectmoe.cli.output_folder import absolute_corpus, values_given
from selectmoe.cli.progress import format_seconds
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.paths import model_or_embedded

if TYPE_CHECKING:  # these load torch, and --help must not wait for it
    from transformers import PreTrainedTokenizerBase

    from selectmoe.training.tokenized_rows import TokenizedSummary

OPTIONS = {
    "--data": "dataset.data_path",
    "--model": "model",
    "--output": "output",
    "--num-workers": "scaling.num_workers",
    "--resume": "resume",
}


def main(arguments: Sequence[str]) -> None:
    """One run of stage 3. Raises SelectMoeError for what the user can mend."""
    config = parse(arguments)
    started = time.perf_counter()
    tokenizer = require_inputs(config)

    # Only now: --help and a mistyped option must not wait for the imports below.
    from jobs.on_ray.training import storage_of
    from jobs.stage_3_finetune.finetune_worker import train_adapter
    from selectmoe.finetune.supervised_data import prepare_supervised_rows

    output = claim_output(config)
    summary = tokenize(partial(prepare_supervised_rows, config, tokenizer, output))
    report = train_in(output, train_adapter, config)
    folder, name = storage_of(output, config.scaling.storage_path)
    report["adapter"] = f"{folder}/{name}/{report.pop('checkpoint')}"
    seconds = time.perf_counter() - started
    write_manifest(config, output, summary, report, wall_seconds=seconds)
    print_report(summary, report, wall_seconds=seconds)


def parse(arguments: Sequence[str]) -> FinetuneConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    description = "Stage 3: finetune a causal language model with LoRA on selected rows."
    parser = stage_parser("jobs/finetune.py", description, FinetuneConfig, OPTIONS)
    options, overrides = parse_arguments(parser, arguments)
    values = values_given(vars(options))
    config = load_config(FinetuneConfig, overrides, values=values)
    return with_absolute_paths(with_absolute_data(config))


def with_absolute_data(config: FinetuneConfig) -> FinetuneConfig:
    if config.dataset.data_path is None:
        return config
    data_path = absolute_corpus(config.dataset.data_path, "dataset.data_path")
    dataset = dataclasses.replace(config.dataset, data_path=data_path)
    return dataclasses.replace(config, dataset=dataset)


def require_inputs(config: FinetuneConfig) -> "PreTrainedTokenizerBase":
    """Refuses data, a model or target modules that do not exist before Ray starts or a folder is
    made; returns the model's tokenizer."""
    from selectmoe.model.checkpoint import read_model_config

    model = model_or_embedded(config.model)
    read_model_config(model)

    from selectmoe.finetune.sources import require_source
    from selectmoe.finetune.supervised_data import load_target_tokenizer
    from selectmoe.training.lora_targets import find_targets
    from selectmoe.training.memory_estimate import skeleton

    require_source(config.dataset)
    find_targets(skeleton(model), config.training.lora, model_name=model)
    return load_target_tokenizer(config)


def print_report(
    summary: "TokenizedSummary", report: Mapping[str, Any], *, wall_seconds: float
) -> None:
    rejected = sum(summary.num_rejected.values())
    rows = (
        ("rows", f"{summary.num_rows:,} ({rejected:,} rejected, {summary.description})"),
        ("trained", f"{report['num_trained_parameters']:,} parameters"),
        ("steps", f"{report['num_steps']:,} in {format_seconds(wall_seconds)}"),
        ("loss", f"{report['loss']:.4f} at the end"),
        ("adapter", report["adapter"]),
    )
    print_rows(rows)
