"""LoRA finetuning of a causal language model on conversations: loss on the assistant's tokens.

rows         tokenized into the folder of the run        `tokenized_rows`
memory       estimated before weights are read           `memory_estimate`
model        the target, frozen, with an adapter         `lora_targets`
checkpoints  <scratch>/checkpoint-N
exports      the adapter alone, and the merged model     `exports`
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from selectmoe.config.finetune import FinetuneConfig, FinetuneTrainingConfig
from selectmoe.config.loading import resolved
from selectmoe.data.packing import IGNORED_LABEL
from selectmoe.data.writers import write_json
from selectmoe.errors import ModelError, ResumeError, TrainingStoppedError, list_names
from selectmoe.finetune.exports import save_final_adapter
from selectmoe.finetune.supervised_data import StepOrder, SupervisedRows
from selectmoe.model.checkpoint import model_folder, read_model_config, split_revision
from selectmoe.model.devices import choose_dtype
from selectmoe.model.free_memory import in_words
from selectmoe.model.quiet_loading import load_model, register_select_moe
from selectmoe.paths import model_or_embedded
from selectmoe.training.lora_targets import add_adapter
from selectmoe.training.memory_estimate import (
    MemoryEstimate,
    available_memory,
    estimate_memory,
    require_memory,
    vocabulary_size,
)
from selectmoe.training.metrics import LastStep, MetricsFile, tensorboard
from selectmoe.training.sharding import (
    ShardableTrainer,
    average_gradients,
    decoder_layers,
    shard_frozen,
)
from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

# Shape letters: B = rows of a batch, T = tokens of its longest row, V = vocabulary.
FINGERPRINT_NAME = "finetune.json"
# Settings that a resumed run may change: they decide where and how fast it trains, not what it
# learns. The data is identified by a hash of its tokens, so its path may change too.
FREE_ON_RESUME = ("output", "output_root", "resume", "max_rejected", "dataset.data_path", "merge")


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """What one finetuning run reports."""

    checkpoint: str  # the last one's name
    num_steps: int
    num_trained_parameters: int
    loss: float  # of the last line of metrics
    seconds: float
    estimated_bytes: int  # lower bound of the memory on this worker
    peak_gpu_bytes: int | None  # allocated by torch; None on a CPU


def finetune(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, worker: TrainingWorker
) -> FinetuneReport:
    """Trains an adapter on the tokenized rows in `worker.output`; metrics go there too.

    A run that is resumed from one of its checkpoints ends with the same adapter as one that was
    not interrupted.
    Raises NotEnoughMemoryError, ModelError or ConfigError before the first step, ResumeError for a
    checkpoint of another configuration, TrainingStoppedError where the loss is not finite.
    """
    rows = SupervisedRows(worker.output)
    fingerprint = checkpoint_fingerprint(config, rows.summary.rows_sha256)
    if worker.resume_from is not None:
        require_same_run(Path(worker.resume_from), fingerprint)
    model_name = model_or_embedded(config.model, config.revision)
    estimated = require_fit(config, model_name, worker, max_tokens=rows.summary.max_tokens)
    set_seed(config.seed)  # for the adapter's initial weights
    target = load_target(config, model_name, worker)
    require_vocabulary(target, rows, model_name)
    model = add_adapter(target, config.training.lora, model_name=model_name)
    if config.training.gradient_checkpointing:
        checkpoint_layers(target)
    is_sharded = config.training.strategy == "fsdp"
    if is_sharded:
        shard_frozen(model, decoder_layers(target), uses_gpu=worker.uses_gpu)
    metrics = [LastStep(), MetricsFile(worker.output), *tensorboard(worker.output)]
    trainer = AnswerTrainer(
        model=model,
        args=training_arguments(config, worker, num_rows=len(rows)),
        rows=rows,
        is_sharded=is_sharded,
        rows_per_step=config.training.effective_batch_size,
        max_grad_norm=config.training.max_grad_norm,
        callbacks=[*metrics, CompleteCheckpoints(fingerprint, tokenizer), *worker.callbacks],
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=worker.resume_from)
    checkpoint = f"checkpoint-{trainer.state.global_step}"
    if worker.rank == 0:
        save_final_adapter(last_checkpoint(worker, checkpoint), worker.output)
    return FinetuneReport(
        checkpoint=checkpoint,
        num_steps=trainer.state.global_step,
        num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loss=next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log),
        seconds=round(time.perf_counter() - started, 3),
        estimated_bytes=estimated.total,
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if worker.uses_gpu else None,
    )


def last_checkpoint(worker: TrainingWorker, name: str) -> Path:
    """The last checkpoint: written now, or the one that a run resumed from after its last step."""
    written = worker.scratch / name
    return written if written.is_dir() else Path(str(worker.resume_from))


def require_fit(
    config: FinetuneConfig, model_name: str, worker: TrainingWorker, *, max_tokens: int
) -> MemoryEstimate:
    """Raises NotEnoughMemoryError where this worker has less memory than is needed."""
    training = config.training
    # Without a GPU every worker holds the whole model while it loads.
    is_sharded = training.strategy == "fsdp" and worker.uses_gpu
    estimate = estimate_memory(
        model_name,
        training,
        dtype=dtype_of(training, worker),
        max_tokens=max_tokens,
        num_shards=worker.num_workers if is_sharded else 1,
    )
    available, kind = available_memory(worker.device, num_sharing=worker.num_sharing)
    logger.info("memory: at least %s; %s free", estimate, in_words(available))
    require_memory(estimate, training, available=available, kind=kind, max_tokens=max_tokens)
    return estimate


def load_target(config: FinetuneConfig, model_name: str, worker: TrainingWorker) -> PreTrainedModel:
    """The model to adapt. A Select-MoE becomes its base: its gates are forced open."""
    register_select_moe()
    settings: dict[str, Any] = {}
    if read_model_config(model_name).get("model_type") == "select_moe":
        settings = {"quality_gate_forced_open": True, "output_router_logits": False}
    target = load_model(
        cast("type[PreTrainedModel]", AutoModelForCausalLM),
        model_folder(model_name),
        dtype=dtype_of(config.training, worker),
        attn_implementation=config.training.attn_implementation,
        **settings,
    )
    # PEFT saves it; not a folder of the hub's cache.
    target.name_or_path, _ = split_revision(model_name)
    return target


def require_vocabulary(model: PreTrainedModel, rows: SupervisedRows, model_name: str) -> None:
    """Refuses a tokenizer that has more tokens than the model has embeddings for."""
    highest, size = int(rows.token_ids.max()), vocabulary_size(model)
    if highest >= size:
        raise ModelError(
            f"{model_name}: its tokenizer has a token {highest}, and the model embeds {size}; "
            "is it the tokenizer of another model?"
        )


def dtype_of(training: FinetuneTrainingConfig, worker: TrainingWorker) -> torch.dtype:
    return choose_dtype(training.dtype, on_gpu=worker.uses_gpu)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Activation checkpointing; transformers renamed the method between releases."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def num_optimizer_steps(
    num_rows: int, *, batch_size: int, num_workers: int, num_batches_per_step: int
) -> int:
    """Optimizer steps in one epoch; the last one may have fewer rows."""
    batches_per_worker = math.ceil(math.ceil(num_rows / batch_size) / num_workers)
    return math.ceil(batches_per_worker / num_batches_per_step)


def training_arguments(
    config: FinetuneConfig, worker: TrainingWorker, *, num_rows: int
) -> TrainingArguments:
    training = config.training
    num_batches = training.effective_batch_size // (training.batch_size * worker.num_workers)
    num_steps = training.num_epochs * num_optimizer_steps(
        num_rows,
        batch_size=training.batch_size,
        num_workers=worker.num_workers,
        num_batches_per_step=num_batches,
    )
    return TrainingArguments(
        output_dir=str(worker.scratch),
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=num_batches,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=math.ceil(training.warmup_ratio * num_steps),
        weight_decay=training.weight_decay,
        # Trainer's own clipping turns a gradient of infinite norm into 0, without a word.
        max_grad_norm=0.0,
        # The adapter is float32 and the target is not: autocast converts between them.
        bf16=worker.uses_gpu and dtype_of(training, worker) == torch.bfloat16,
        average_tokens_across_devices=True,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # `ClipOrStop` ends the run first
        save_strategy="epoch" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 1,
        save_total_limit=config.scaling.num_checkpoints,
        seed=config.seed,
        use_cpu=not worker.uses_gpu,
        dataloader_pin_memory=worker.uses_gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


class AnswerTrainer(ShardableTrainer):
    """A Trainer whose loss is the mean over the answer tokens of a whole optimizer step, however
    its rows are spread over batches and workers."""

    def __init__(
        self,
        *,
        rows: SupervisedRows,
        rows_per_step: int,
        max_grad_norm: float,
        **kwargs: Any,  # noqa: ANN401 (handed on to Trainer, which types them)
    ) -> None:
        super().__init__(train_dataset=rows, data_collator=rows.batch, **kwargs)
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.num_tokens = 0  # of this worker since the last line of metrics, without padding
        self.logged_at = time.perf_counter()
        self.grad_norm = 0.0  # of the last step, before clipping
        self.losses_of_step: list[tuple[Tensor, Tensor]] = []  # (row numbers, loss) of each batch
        self.model_accepts_loss_kwargs = True  # makes Trainer count a step's labels
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ClipOrStop(self, max_grad_norm))

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:  # noqa: ANN401
        seed = self.args.seed
        return StepOrder(self.rows.lengths, rows_per_step=self.rows_per_step, seed=seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        # The model gets no labels: some models add other losses to that of the tokens.
        logits_BTV = model(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1),
            inputs["labels"][:, 1:].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        # DDP averages the workers' gradients; `num_items_in_batch` counts the labels of all.
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        self.losses_of_step.append((inputs["row_numbers"], loss.detach()))
        return (loss, {"logits": logits_BTV}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Adds the gradient norm before clipping, and tokens per second."""
        if "loss" in logs:
            seconds = time.perf_counter() - self.logged_at
            speed = self.num_tokens * self.args.world_size / seconds
            logs = logs | {"grad_norm": self.grad_norm, "tokens_per_second": round(speed, 1)}
            self.num_tokens, self.logged_at = 0, time.perf_counter()
        super().log(logs, *args, **kwargs)


class ClipOrStop(TrainerCallback):
    """Before each optimizer step: clips the gradient, or ends the run on all workers where the
    gradient or a loss is not finite. Checked once a step, since the check waits for the GPU."""

    def __init__(self, trainer: AnswerTrainer, max_grad_norm: float) -> None:
        self.trainer = trainer
        self.max_grad_norm = max_grad_norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        trainer = self.trainer
        batches, trainer.losses_of_step = trainer.losses_of_step, []
        numbers = torch.cat([numbers for numbers, _ in batches])
        losses = torch.stack([loss for _, loss in batches])
        model = cast(nn.Module, trainer.model)
        if trainer.is_sharded:
            average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
        finite = losses.isfinite().all() & norm.isfinite()
        if bool(trainer.accelerator.gather(finite[None].int()).all()):
            trainer.grad_norm = float(norm)
            trainer.num_tokens += int(trainer.rows.lengths[numbers.cpu().numpy()].sum())
            return
        bad = [row for rows, loss in batches if not loss.isfinite() for row in rows.tolist()]
        names = gather_object(trainer.rows.ids_of(bad))
        what = "the loss" if names else "the gradient"
        rows = names or gather_object(trainer.rows.ids_of(numbers.tolist()))
        raise TrainingStoppedError(
            f"step {state.global_step + 1}: {what} is not a finite number on the batch of the rows "
            f"{list_names(rows)}; lower training.learning_rate or check these rows"
        )


class CompleteCheckpoints(TrainerCallback):
    """Adds the run's fingerprint, and the tokenizer with its chat template."""

    def __init__(
        self, fingerprint: Mapping[str, object], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.tokenizer.save_pretrained(folder)
            write_json(folder / FINGERPRINT_NAME, self.fingerprint)


def checkpoint_fingerprint(config: FinetuneConfig, rows_sha256: str) -> dict[str, object]:
    """What a run must have in common with the checkpoint that it resumes from."""
    settings = {
        key: value
        for key, value in resolved(config).items()
        if key not in FREE_ON_RESUME and not key.startswith("scaling.")
    }
    return settings | {"rows_sha256": rows_sha256}


def require_same_run(checkpoint: Path, fingerprint: Mapping[str, object]) -> None:
    """Raises ResumeError unless the checkpoint is of a run with the same fingerprint."""
    file = checkpoint / FINGERPRINT_NAME
    if not file.is_file():
        raise ResumeError(
            f"{checkpoint}: not a complete checkpoint of stage 3: it has no {FINGERPRINT_NAME}"
        )
    saved = json.loads(file.read_text("utf-8"))
    keys = {*saved, *fingerprint}
    different = sorted(key for key in keys if saved.get(key) != fingerprint.get(key))
    if different:
        key = different[0]
        raise ResumeError(
            f"{checkpoint}: a checkpoint of another configuration: {key} is {saved.get(key)!r} "
            f"there and {fingerprint.get(key)!r} here"
        )
