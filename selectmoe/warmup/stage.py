"""Warm-up of the gates: a few minutes that teach them to tell a sample from a worse copy.

As a rule everything but the quality gates is frozen, and no gradient passes through what is
frozen: the gates learn from the contrastive loss on their own logits (`quality_losses.contrastive`)
in little more than the time and memory of inference.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from selectmoe.config.warmup import TrainingConfig, WarmupConfig
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.data.chat import ChatTokenizer
from selectmoe.errors import ConfigError
from selectmoe.model.checkpoint import ADAPTER_FOLDER_NAME, model_folder
from selectmoe.model.devices import choose_dtype
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.model.registration import register_select_moe
from selectmoe.paths import model_or_embedded
from selectmoe.records import Sample
from selectmoe.training.metrics import LastStep, LogLines, MetricsFile, tensorboard
from selectmoe.warmup.cache import (
    load_warmup_rows,
    read_warmup_summary,
    rows_of_corpus,
    warmup_tokenizer,
)
from selectmoe.warmup.gate_model import Trainee, load_gated_model, prepare_trainee
from selectmoe.warmup.gate_trainer import GateTrainer
from selectmoe.warmup.rows import WarmupRows
from selectmoe.warmup.settings import corruption_kinds, learns_detached
from selectmoe.warmup.sharding import shard_frozen
from selectmoe.warmup.step_batches import StepBatches, StepSettings, TrainingRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlace:
    """Where a warm-up runs, and as which of how many workers."""

    output: Path
    """Folder of the run: the gates, the metrics."""
    scratch: Path
    """Folder of this worker's checkpoints."""
    rank: int = 0
    num_workers: int = 1
    num_sharing: int = 1
    """Workers on this machine, which share its memory where they have no GPU."""
    uses_gpu: bool = False
    resume_from: str | None = None
    """Checkpoint to go on from."""
    callbacks: tuple[TrainerCallback, ...] = ()
    rows: Path | None = None
    """Folder that `prepare_warmup_rows` wrote; None reads the corpus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupReport:
    """What came out of a warm-up."""

    weights: str  # full_rank_weights.safetensors, or the folder of the adapter
    num_samples: int
    num_rejected: int
    num_steps: int
    num_parameters_trained: int
    last_metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateWarmup:
    """Settings of a contrastive warm-up of gates alone, in one process."""

    num_steps: int = 1_000
    """Optimizer steps."""
    batch_size: int = 8
    """Samples of a step; their copies are not counted."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule. Gates are linear and start near zero: they bear a large one."""
    max_tokens_per_batch: int = 8_192
    """Tokens that are computed at a time, padding included."""
    max_sequence_length: int = 512
    """Longer samples are cut there."""
    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    """Corruptions to make copies with."""
    label_weight: float = 0.5
    """Share of the label form in the loss; the rest ranks a sample above its own copy."""
    seed: int = 0
    """Of the order, the kinds and the corruptions."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(CORRUPTIONS))
        if unknown:
            raise ConfigError(f"kinds must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")


def run_warmup(config: WarmupConfig, place: TrainingPlace) -> WarmupReport:
    """One worker's part of stage 1, from the settings to the weights that rank 0 writes."""
    register_select_moe()
    name = model_or_embedded(config.model)
    folder = model_folder(name)
    training = config.training
    model = load_gated_model(
        folder,
        training,
        uses_gpu=place.uses_gpu,
        num_sharing=place.num_sharing,
        seed=config.seed,
    )
    chat = warmup_tokenizer(config)
    found = warmup_rows(config, chat, place)
    if learns_detached(training):
        model.model.skip_last_experts()  # after the last gate nothing is computed for anyone
    trainee = prepare_trainee(model, training, name=name, seed=config.seed)
    settings = step_settings(training, place, seed=config.seed)
    trainer = train(trainee, StepBatches(found.rows, chat, settings), training, place=place)
    return WarmupReport(
        weights=str(save_trained(trainer, place)),
        num_samples=len(found.rows.samples),
        num_rejected=num_rejected(found, place),
        num_steps=training.num_steps,
        num_parameters_trained=num_trained(trainee.model),
        last_metrics=last_metrics(trainer),
    )


def warmup_rows(config: WarmupConfig, chat: ChatTokenizer, place: TrainingPlace) -> WarmupRows:
    """The rows, from the cache where there is one; says what there is to learn from."""
    if place.rows is not None:
        return load_warmup_rows(place.rows)
    found = rows_of_corpus(config, chat, place.output)
    if place.rank == 0:
        logger.info("%d samples of %d rows", len(found.rows.samples), found.num_read)
    return found


def warm_up_gates(
    model: SelectMoeModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    settings: GateWarmup,
    output: Path,
) -> Path:
    """Trains the gates of `model` in place; returns the written `full_rank_weights.safetensors`."""
    training = TrainingConfig(
        num_steps=settings.num_steps,
        effective_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        corruptions=settings.kinds,
        label_weight=settings.label_weight,
        logging_steps=max(settings.num_steps // 20, 1),
        save_steps=settings.num_steps,
    )
    place = TrainingPlace(
        output=output, scratch=output, uses_gpu=torch.cuda.is_available(), callbacks=(LogLines(),)
    )
    chat = ChatTokenizer(tokenizer, max_sequence_length=settings.max_sequence_length)
    rows = TrainingRows(samples, chat.tokenize(samples))
    batches = StepBatches(rows, chat, step_settings(training, place, seed=settings.seed))
    trainee = prepare_trainee(model, training, name="the model", seed=settings.seed)
    return save_trained(train(trainee, batches, training, place=place), place)


def step_settings(training: TrainingConfig, place: TrainingPlace, *, seed: int) -> StepSettings:
    return StepSettings(
        effective_batch_size=training.effective_batch_size,
        batch_size=training.batch_size,
        max_tokens_per_batch=training.max_tokens_per_batch or (16_384 if place.uses_gpu else 4_096),
        kinds=corruption_kinds(training),
        full_sequence_prediction=training.full_sequence_prediction,
        seed=seed,
        rank=place.rank,
        num_workers=place.num_workers,
        first_step=steps_done(place),
    )


def steps_done(place: TrainingPlace) -> int:
    """Steps of the checkpoint to go on from."""
    if place.resume_from is None:
        return 0
    state = json.loads((Path(place.resume_from) / "trainer_state.json").read_text("utf-8"))
    return int(state["global_step"])


def train(
    trainee: Trainee, batches: StepBatches, training: TrainingConfig, *, place: TrainingPlace
) -> GateTrainer:
    """Trains from the checkpoint, if any, to the last step."""
    place.output.mkdir(parents=True, exist_ok=True)
    is_sharded = training.strategy == "fsdp"
    if is_sharded:
        shard_frozen(trainee.model, uses_gpu=place.uses_gpu)
    trainer = GateTrainer(
        model=trainee.model,
        args=training_arguments(training, place, seed=batches.settings.seed),
        train_dataset=batches,
        callbacks=[
            LastStep(), MetricsFile(place.output), *tensorboard(place.output), *place.callbacks
        ],
        objective=trainee.objective,
        num_layers=trainee.num_layers,
        keeps_gates_alone=not trainee.is_adapter,
        is_sharded=is_sharded,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if steps_done(place) < training.num_steps:
        trainer.train(resume_from_checkpoint=place.resume_from)
    else:  # Trainer would do one step more
        trainer._load_from_checkpoint(str(place.resume_from))
    return trainer


def training_arguments(
    training: TrainingConfig, place: TrainingPlace, *, seed: int
) -> TrainingArguments:
    dtype = choose_dtype(training.dtype, on_gpu=place.uses_gpu)
    return TrainingArguments(
        output_dir=str(place.scratch),
        max_steps=training.num_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(training.num_steps // 20, 1),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=1,  # StepBatches makes whole steps
        logging_steps=training.logging_steps,
        save_steps=training.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        bf16=dtype == torch.bfloat16,
        # Of detached gates all are used in every step. Looking for those that are not, DDP takes
        # the decoder's output apart, and cannot put it together again with the gates' logits in it.
        ddp_find_unused_parameters=not learns_detached(training),
        use_cpu=not place.uses_gpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ignore_data_skip=True,
        logging_nan_inf_filter=False,  # such a loss stops the run
        disable_tqdm=True,
    )


def save_trained(trainer: GateTrainer, place: TrainingPlace) -> Path:
    """Writes what was trained into the run's folder, on rank 0; returns where."""
    model: Any = trainer.model
    if trainer.keeps_gates_alone:
        return save_gate_weights(model, place.output) if place.rank == 0 else place.output
    folder = place.output / ADAPTER_FOLDER_NAME
    if place.rank == 0:
        model.save_pretrained(folder)
    return folder


def num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def num_rejected(found: WarmupRows, place: TrainingPlace) -> int:
    summary = None if place.rows is None else read_warmup_summary(place.rows)
    return len(found.rejected) if summary is None else summary.num_rejected


def last_metrics(trainer: GateTrainer) -> dict[str, float]:
    """The newest line of metrics."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return dict(rows[-1]) if rows else {}
