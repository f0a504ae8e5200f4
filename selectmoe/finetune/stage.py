"""LoRA finetuning of a causal language model on conversations: loss on the assistant's tokens.

rows        = SupervisedRows(folder)                     tokenised by `supervised_data`
memory      refused here, before weights are read        `memory_estimate`
model       = the target, frozen, with an adapter        `lora_targets`
checkpoints = <checkpoints>/checkpoint-N                 what peft and lm-eval load
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import resolved
from selectmoe.config.lora import LoraSettings
from selectmoe.data.writers import write_json
from selectmoe.errors import ModelError, ResumeError
from selectmoe.finetune.supervised_data import NOT_A_TARGET, StepOrder, SupervisedRows
from selectmoe.model.checkpoint import model_folder, read_model_config
from selectmoe.model.devices import choose_dtype
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.registration import register_select_moe
from selectmoe.paths import model_or_embedded
from selectmoe.training.lora_targets import find_targets
from selectmoe.training.memory_estimate import (
    MemoryEstimate,
    available_memory,
    estimate_memory,
    in_words,
    require_memory,
)
from selectmoe.training.metrics import LastStep, LogLines, MetricsFile, tensorboard
from selectmoe.training.stopping import TrainingStoppedError, named

logger = logging.getLogger(__name__)

# Shape letters: B = rows of a batch, T = tokens of its longest row, V = vocabulary.
MARK_NAME = "finetune.json"
# These change where, how fast and on what machines a run goes on, not what it learns. The data is
# known by a hash of its tokens, wherever it lies.
FREE_ON_RESUME = ("output", "output_root", "resume", "max_rejected", "dataset.data_path")


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """What a finetuning took and where it ended."""

    checkpoint: str  # the last one's name
    num_steps: int
    num_trained_parameters: int
    loss: float  # of the last line of metrics
    seconds: float
    estimated_bytes: int  # of memory, at the least, on this worker
    peak_gpu_bytes: int | None  # that torch held there; None on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlace:
    """Where one worker trains, and beside how many others."""

    checkpoints: Path  # folder for checkpoint-N
    resume_from: str | None = None  # folder of the checkpoint to go on from
    uses_gpu: bool = False
    num_workers: int = 1
    num_sharing: int = 1  # workers on this machine

    @property
    def device(self) -> str:
        return "cuda" if self.uses_gpu else "cpu"

    def dtype(self, name: str | None) -> torch.dtype:
        return choose_dtype(name, on_gpu=self.uses_gpu)


def finetune(
    config: FinetuneConfig,
    rows: SupervisedRows,
    tokenizer: PreTrainedTokenizerBase,
    place: TrainingPlace,
    *,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneReport:
    """Trains an adapter; writes metrics into `output` and checkpoint-N into `place.checkpoints`.

    A run that goes on from one of its checkpoints ends with the same adapter as one that was not
    interrupted. callbacks: they find each checkpoint whole.
    Raises NotEnoughMemoryError, ModelError or ConfigError before the first step, ResumeError for a
    checkpoint of another configuration, TrainingStoppedError where the loss is not a number.
    """
    mark = checkpoint_mark(config, rows.summary.rows_sha256)
    if place.resume_from is not None:
        require_same_run(Path(place.resume_from), mark)
    model_name = model_or_embedded(config.model)
    estimated = require_fit(config, model_name, place, max_tokens=rows.summary.max_tokens)
    set_seed(config.seed)  # the adapter's first weights
    target = load_target(config, model_name, place)
    require_vocabulary(target, rows, model_name)
    model = with_adapter(target, config.training.lora, model_name=model_name)
    if config.training.gradient_checkpointing:
        checkpoint_layers(target)
    output.mkdir(parents=True, exist_ok=True)
    metrics = [LastStep(), MetricsFile(output), LogLines(), *tensorboard(output)]
    trainer = AnswerTrainer(
        model=model,
        args=training_arguments(config, place, num_rows=len(rows)),
        rows=rows,
        rows_per_step=config.training.effective_batch_size,
        max_grad_norm=config.training.max_grad_norm,
        callbacks=[*metrics, MarkCheckpoints(mark, tokenizer), *callbacks],
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=place.resume_from)
    return FinetuneReport(
        checkpoint=f"checkpoint-{trainer.state.global_step}",
        num_steps=trainer.state.global_step,
        num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loss=next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log),
        seconds=round(time.perf_counter() - started, 3),
        estimated_bytes=estimated.total,
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if place.uses_gpu else None,
    )


def require_fit(
    config: FinetuneConfig, model_name: str, place: TrainingPlace, *, max_tokens: int
) -> MemoryEstimate:
    """Raises NotEnoughMemoryError where this worker cannot have the memory that is needed."""
    training = config.training
    estimate = estimate_memory(
        model_name, training, dtype=place.dtype(training.dtype), max_tokens=max_tokens
    )
    available, what = available_memory(place.device, num_sharing=place.num_sharing)
    logger.info("memory: at least %s; %s are free", estimate, in_words(available))
    require_memory(estimate, training, available=available, place=what, max_tokens=max_tokens)
    return estimate


def load_target(config: FinetuneConfig, model_name: str, place: TrainingPlace) -> PreTrainedModel:
    """The model to adapt. A Select-MoE has its gates forced open: it is the OLMoE it came from."""
    register_select_moe()
    settings: dict[str, Any] = {}
    if read_model_config(model_name).get("model_type") == "select_moe":
        settings = {"quality_gate_forced_open": True, "output_router_logits": False}
    target = load_model(
        cast("type[PreTrainedModel]", AutoModelForCausalLM),
        model_folder(model_name),
        dtype=place.dtype(config.training.dtype),
        attn_implementation=config.training.attn_implementation,
        **settings,
    )
    target.name_or_path = model_name  # what peft writes down; not a folder of the hub's cache
    return target


def require_vocabulary(model: PreTrainedModel, rows: SupervisedRows, model_name: str) -> None:
    """Refuses a tokenizer that has more tokens than the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    highest, size = int(rows.token_ids.max()), embeddings.weight.shape[0]
    if highest >= size:
        raise ModelError(
            f"{model_name}: its tokenizer gives the token {highest}, and the model knows {size}; "
            "is it the tokenizer of another model?"
        )


def with_adapter(model: PreTrainedModel, lora: LoraSettings, *, model_name: str) -> PeftModel:
    """The model, frozen, with a new adapter, which at first changes nothing."""
    targets = find_targets(
        model, lora.target_modules, lora_dropout=lora.lora_dropout, model_name=model_name
    )
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that is deprecated there; nothing of ours causes it.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Each layer keeps its input alone. The method was renamed between releases."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def num_optimizer_steps(
    num_rows: int, *, batch_size: int, num_workers: int, num_batches_per_step: int
) -> int:
    """Of one epoch; its last step may have fewer rows."""
    batches_per_worker = math.ceil(math.ceil(num_rows / batch_size) / num_workers)
    return math.ceil(batches_per_worker / num_batches_per_step)


def training_arguments(
    config: FinetuneConfig, place: TrainingPlace, *, num_rows: int
) -> TrainingArguments:
    training = config.training
    num_batches = training.effective_batch_size // (training.batch_size * place.num_workers)
    num_steps = training.num_epochs * num_optimizer_steps(
        num_rows,
        batch_size=training.batch_size,
        num_workers=place.num_workers,
        num_batches_per_step=num_batches,
    )
    return TrainingArguments(
        output_dir=str(place.checkpoints),
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=num_batches,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(training.warmup_ratio * num_steps),
        weight_decay=training.weight_decay,
        # Not Trainer's clipping: it takes a gradient of infinite length for one of 0, in silence.
        max_grad_norm=0.0,
        # The adapter's numbers are float32 and the target's are not: autocast is between them.
        bf16=place.uses_gpu and place.dtype(training.dtype) == torch.bfloat16,
        average_tokens_across_devices=True,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # `ClipOrStop` does not let it come to that
        save_strategy="epoch" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 1,
        save_total_limit=config.scaling.num_checkpoints,
        seed=config.seed,
        use_cpu=not place.uses_gpu,
        dataloader_pin_memory=place.uses_gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


class AnswerTrainer(Trainer):
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
        self.num_tokens = 0  # that this worker read since the last line of metrics, no padding
        self.logged_at = time.perf_counter()
        self.grad_norm = 0.0  # of the last step, before it was shortened
        self.losses_of_step: list[tuple[Tensor, Tensor]] = []  # row numbers, loss; by batch
        self.model_accepts_loss_kwargs = True  # so that Trainer counts a step's targets
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
        # The model gets no labels: some add losses of their own to that of the tokens.
        logits_BTV = model(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1),
            inputs["labels"][:, 1:].flatten(),
            ignore_index=NOT_A_TARGET,
            reduction="sum",
        )
        # Workers' gradients are averaged, and their targets were counted together.
        loss = loss * self.accelerator.num_processes / num_items_in_batch
        self.losses_of_step.append((inputs["row_numbers"], loss.detach()))
        return (loss, {"logits": logits_BTV}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """As Trainer's, with our gradient norm and the speed."""
        if "loss" in logs:
            seconds = time.perf_counter() - self.logged_at
            speed = self.num_tokens * self.args.world_size / seconds
            logs = logs | {"grad_norm": self.grad_norm, "tokens_per_second": round(speed, 1)}
            self.num_tokens, self.logged_at = 0, time.perf_counter()
        super().log(logs, *args, **kwargs)


class ClipOrStop(TrainerCallback):
    """Before each optimizer step: shortens the gradient, or ends the run, on all workers, where it
    or a loss is not finite. One look a step, since it waits for the GPU."""

    def __init__(self, trainer: AnswerTrainer, max_grad_norm: float) -> None:
        self.trainer = trainer
        self.max_grad_norm = max_grad_norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        trainer = self.trainer
        batches, trainer.losses_of_step = trainer.losses_of_step, []
        numbers = torch.cat([numbers for numbers, _ in batches])
        losses = torch.stack([loss for _, loss in batches])
        model = cast(nn.Module, trainer.model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
        finite = losses.isfinite().all() & norm.isfinite()
        if bool(trainer.accelerator.gather(finite[None].int()).all()):
            trainer.grad_norm = float(norm)
            trainer.num_tokens += int(trainer.rows.lengths[numbers.cpu().numpy()].sum())
            return
        bad = [row for rows, loss in batches if not loss.isfinite() for row in rows.tolist()]
        names = gather_object(trainer.rows.names(bad))
        what = "the loss" if names else "the gradient"
        rows = names or gather_object(trainer.rows.names(numbers.tolist()))
        raise TrainingStoppedError(
            f"step {state.global_step + 1}: {what} is not a finite number on the batch of the rows "
            f"{named(rows)}; lower training.learning_rate, or look at these rows"
        )


class MarkCheckpoints(TrainerCallback):
    """Puts into each checkpoint what it is of, and the tokenizer with its chat template."""

    def __init__(self, mark: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
        self.mark = mark
        self.tokenizer = tokenizer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.tokenizer.save_pretrained(folder)
            write_json(folder / MARK_NAME, self.mark)


def checkpoint_mark(config: FinetuneConfig, rows_sha256: str) -> dict[str, object]:
    """What two runs must have in common for the one to go on from the other's checkpoint."""
    settings = {
        key: value
        for key, value in resolved(config).items()
        if key not in FREE_ON_RESUME and not key.startswith("scaling.")
    }
    return settings | {"rows_sha256": rows_sha256}


def require_same_run(checkpoint: Path, mark: Mapping[str, object]) -> None:
    """Raises ResumeError unless the checkpoint is one of a run with the same mark."""
    file = checkpoint / MARK_NAME
    if not file.is_file():
        raise ResumeError(f"{checkpoint}: not a whole checkpoint of stage 3: it has no {MARK_NAME}")
    saved = json.loads(file.read_text("utf-8"))
    different = sorted(key for key in {*saved, *mark} if saved.get(key) != mark.get(key))
    if different:
        key = different[0]
        raise ResumeError(
            f"{checkpoint}: a checkpoint of another configuration: {key} is {saved.get(key)!r} "
            f"there and {mark.get(key)!r} here"
        )
