"""Gate warm-up: trains the quality gates to tell a sample from a corrupted copy of it.

By default everything except the quality gates is frozen, and no gradient flows through what is
frozen: the gates learn from the contrastive loss on their own logits (`quality_losses.contrastive`)
in little more than the time and memory of inference.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from selectmoe.config.warmup import TrainingConfig, WarmupConfig
from selectmoe.model.checkpoint import ADAPTER_FOLDER_NAME, model_folder
from selectmoe.model.devices import choose_dtype
from selectmoe.model.file_modes import follow_umask
from selectmoe.model.gate_weights import save_gate_weights, write_gate_settings
from selectmoe.model.modeling_select_moe import SelectMoeDecoderLayer
from selectmoe.model.quiet_loading import register_select_moe
from selectmoe.paths import model_or_embedded
from selectmoe.training.metrics import LastStep, MetricsFile, tensorboard
from selectmoe.training.sharding import shard_frozen
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.gate_model import Trainee, is_gate, load_gated_model, prepare_trainee
from selectmoe.warmup.gate_trainer import GateTrainer
from selectmoe.warmup.rows import load_training_rows, warmup_tokenizer
from selectmoe.warmup.settings import corruption_kinds, learns_detached
from selectmoe.warmup.step_batches import StepBatches, StepSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupReport:
    """What one worker reports of a warm-up."""

    weights: str  # path of full_rank_weights.safetensors, or the folder of the adapter
    num_steps: int
    num_parameters_trained: int
    last_metrics: dict[str, float]


def run_warmup(config: WarmupConfig, worker: TrainingWorker) -> WarmupReport:
    """One worker's part of stage 1, on the tokenized rows in `worker.output`; rank 0 writes."""
    register_select_moe()
    name = model_or_embedded(config.model, config.revision)
    folder = model_folder(name)
    training = config.training
    model = load_gated_model(
        folder,
        training,
        uses_gpu=worker.uses_gpu,
        num_sharing=worker.num_sharing,
        seed=config.seed,
    )
    chat = warmup_tokenizer(config)
    rows = load_training_rows(worker.output)
    if learns_detached(training):
        model.model.skip_last_experts()  # no output after the last gate is used
    trainee = prepare_trainee(model, training, name=name, seed=config.seed)
    settings = step_settings(training, worker, seed=config.seed)
    trainer = train(trainee, StepBatches(rows, chat, settings), training, worker=worker)
    trained = [p for p in trainee.model.parameters() if p.requires_grad]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return WarmupReport(
        weights=str(save_trained(trainer, worker)),
        num_steps=training.num_steps,
        num_parameters_trained=sum(parameter.numel() for parameter in trained),
        last_metrics=logs[-1] if logs else {},
    )


def step_settings(
    training: TrainingConfig, worker: TrainingWorker, *, seed: int, for_base: bool = False
) -> StepSettings:
    return StepSettings(
        effective_batch_size=training.effective_batch_size,
        batch_size=training.batch_size,
        max_tokens_per_batch=training.max_tokens_per_batch
        or (16_384 if worker.uses_gpu else 4_096),
        kinds=corruption_kinds(training, for_base=for_base),
        full_sequence_prediction=training.full_sequence_prediction,
        seed=seed,
        rank=worker.rank,
        num_workers=worker.num_workers,
        first_step=steps_done(worker),
    )


def steps_done(worker: TrainingWorker) -> int:
    """Number of steps of the checkpoint to resume from; 0 without one."""
    if worker.resume_from is None:
        return 0
    state = json.loads((Path(worker.resume_from) / "trainer_state.json").read_text("utf-8"))
    return int(state["global_step"])


def train(
    trainee: Trainee,
    batches: StepBatches,
    training: TrainingConfig,
    *,
    worker: TrainingWorker,
    trainer_class: type[GateTrainer] = GateTrainer,
) -> GateTrainer:
    """Trains from the checkpoint, if any, to the last step."""
    worker.output.mkdir(parents=True, exist_ok=True)
    is_sharded = training.strategy == "fsdp"
    if is_sharded:
        shard_frozen(
            trainee.model,
            sharded_layers(trainee.model),
            uses_gpu=worker.uses_gpu,
            keeps=is_gate,
        )
    trainer = trainer_class(
        model=trainee.model,
        args=training_arguments(training, worker, seed=batches.settings.seed),
        train_dataset=batches,
        callbacks=[
            LastStep(), MetricsFile(worker.output), *tensorboard(worker.output), *worker.callbacks
        ],
        objective=trainee.objective,
        keeps_gates_alone=not trainee.is_adapter,
        is_sharded=is_sharded,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if steps_done(worker) < training.num_steps:
        trainer.train(resume_from_checkpoint=worker.resume_from)
    else:  # Trainer would train one step more
        trainer._load_from_checkpoint(str(worker.resume_from))
    return trainer


def sharded_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP shards, of a Select-MoE or of a base with gates."""
    own: list[nn.Module] | None = getattr(model, "sharded_layers", None)
    return own or [m for m in model.modules() if isinstance(m, SelectMoeDecoderLayer)]


def training_arguments(
    training: TrainingConfig, worker: TrainingWorker, *, seed: int
) -> TrainingArguments:
    dtype = choose_dtype(training.dtype, on_gpu=worker.uses_gpu)
    return TrainingArguments(
        output_dir=str(worker.scratch),
        max_steps=training.num_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(training.num_steps // 20, 1),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=1,  # an item of StepBatches is a worker's share of a step
        logging_steps=training.logging_steps,
        save_steps=training.save_steps,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        bf16=dtype == torch.bfloat16,
        # Detached gates are all used in every step. To find unused parameters DDP would rebuild the
        # decoder's output, which it cannot do with the gates' logits in it.
        ddp_find_unused_parameters=not learns_detached(training),
        use_cpu=not worker.uses_gpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ignore_data_skip=True,
        logging_nan_inf_filter=False,  # GateTrainer ends the run first
        disable_tqdm=True,
    )


def save_trained(trainer: GateTrainer, worker: TrainingWorker) -> Path:
    """Writes the trained weights into the run's folder on rank 0; returns their path."""
    model: Any = trainer.model
    if trainer.keeps_gates_alone:
        return save_gate_weights(model, worker.output) if worker.rank == 0 else worker.output
    folder = worker.output / ADAPTER_FOLDER_NAME
    if worker.rank == 0:
        model.save_pretrained(folder)
        write_gate_settings(model.get_base_model(), folder)
        follow_umask(folder)
    return folder
