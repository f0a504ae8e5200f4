"""Warm-up of the quality gates: a few minutes that teach them to tell a sample from a worse copy.

Everything but the gates is frozen, and no gradient passes through what is frozen: the gates learn
from the contrastive loss on their own logits (`quality_losses.contrastive`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.corruptions import CORRUPTIONS
from selectmoe.errors import ConfigError
from selectmoe.gate_scores import good_margins, scored_tokens
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.quality_losses import contrastive
from selectmoe.records import Sample
from selectmoe.training.contrastive_pairs import ContrastivePairs

logger = logging.getLogger(__name__)

# Shape letters: L = layers, B = rows of a batch, T = tokens.


@dataclass(frozen=True, kw_only=True, slots=True)
class GateWarmup:
    """Settings of a contrastive warm-up."""

    num_steps: int = 1_000
    """Optimizer steps, one batch each."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule. Gates are linear and start near zero: they bear a large one."""
    max_tokens_per_batch: int = 8_192
    """Tokens of one step, padding included."""
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


def warm_up_gates(
    model: SelectMoeModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    settings: GateWarmup,
    output: Path,
) -> Path:
    """Trains the gates of `model` in place; returns the written `full_rank_weights.safetensors`."""
    freeze_all_but_gates(model)
    model.detach_gates()
    pairs = ContrastivePairs(
        samples,
        ChatTokenizer(tokenizer, max_sequence_length=settings.max_sequence_length),
        kinds=settings.kinds,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        seed=settings.seed,
    )
    trainer = GateTrainer(
        model=model,
        args=training_arguments(settings, output),
        train_dataset=pairs,
        data_collator=_only,
        callbacks=[LogLines()],
        label_weight=settings.label_weight,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return save_gate_weights(model, output)


def freeze_all_but_gates(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("quality_gate" in name)


def training_arguments(settings: GateWarmup, output: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(settings.num_steps // 20, 1),
        weight_decay=0.0,
        per_device_train_batch_size=1,  # ContrastivePairs makes whole batches
        logging_steps=max(settings.num_steps // 20, 1),
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )


class GateTrainer(Trainer):
    """A Trainer whose loss is contrastive, on the mean margin of each row's answer tokens."""

    def __init__(self, *args: Any, label_weight: float, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.label_weight = label_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        margins_B = row_margins(model, inputs)
        half = len(margins_B) // 2
        labels_B = torch.arange(len(margins_B), device=margins_B.device) < half
        pairs_B = torch.arange(half, device=margins_B.device).repeat(2)
        label_loss, ranking_loss = (
            contrastive(margins_B, labels_B, pair_ids=pairs_B, form=form)
            for form in ("label", "ranking")
        )
        loss = self.label_weight * label_loss + (1 - self.label_weight) * ranking_loss
        return (loss, {"margins": margins_B}) if return_outputs else loss


def row_margins(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the margin over layers and answer tokens: float32 [B]; its sigmoid is the score."""
    # No attention mask: padding is on the right, where causal attention never looks back from.
    decoded = model(input_ids=inputs["input_ids"], use_cache=False, output_quality_logits=True)
    margins_LBT = good_margins(torch.stack(decoded["quality_logits"]))
    mask_BT = scored_tokens(inputs["answer_mask"], inputs["attention_mask"], "answer").float()
    return (margins_LBT.mean(0) * mask_BT).sum(1) / mask_BT.sum(1)


class LogLines(TrainerCallback):
    """One line of ours for each of Trainer's logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        if logs and "loss" in logs:
            logger.info(
                "warm-up step %d of %d: loss %.4f",
                state.global_step,
                state.max_steps,
                float(logs["loss"]),
            )


def _only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    [batch] = batches
    return batch
