"""The losses that a warm-up step minimizes, and the margins that it reports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selectmoe.model.quality_losses import contrastive
from selectmoe.scoring.formulas import good_margins, scored_tokens
from selectmoe.warmup.step_batches import MicroBatch

# Shape letters: L = layers, B = rows of a batch (real ones first, then their copies), T = tokens.


@dataclass(frozen=True, slots=True, eq=False)
class MicroLoss:
    """The loss of one MicroBatch and its parts, as shares of the step: summed over all batches of a
    step on all workers, they are the step's."""

    loss: Tensor
    parts: Mapping[str, Tensor]  # without gradient
    margins_LBT: Tensor  # without gradient


Objective = Callable[[nn.Module, MicroBatch], MicroLoss]


@dataclass(frozen=True, slots=True)
class ContrastiveObjective:
    """Scores real rows above their copies, for a decoder whose gates are detached; the
    language-model head is not computed."""

    label_weight: float
    loss_weight: float

    def __call__(self, model: nn.Module, batch: MicroBatch) -> MicroLoss:
        # No attention mask: padding is on the right, and causal attention never looks there.
        decoded = model(input_ids=batch.token_ids_BT, use_cache=False, output_quality_logits=True)
        margins_LBT = good_margins(torch.stack(tuple(decoded["quality_logits"])))
        parts = contrastive_parts(margins_LBT, batch)
        loss = self.loss_weight * weighted(parts, self.label_weight)
        return MicroLoss(loss, _detached(parts), margins_LBT.detach())


@dataclass(frozen=True, slots=True)
class LanguageModelObjective:
    """The model's own loss on the real rows: language model, load balancing, distribution loss.

    With copies in the batch the contrastive loss is added. The model's configuration must then have
    `quality_loss_weight` 0, since its own losses cannot tell a copy from a real row.
    """

    label_weight: float
    loss_weight: float

    def __call__(self, model: nn.Module, batch: MicroBatch) -> MicroLoss:
        output = model(
            input_ids=batch.token_ids_BT,
            attention_mask=batch.attention_mask_BT,
            labels=batch.labels_BT,
            num_items_in_batch=batch.num_labels_of_step,
            output_router_logits=True,
            use_cache=False,
        )
        logits_LBT2 = torch.stack([layer["quality_logits"] for layer in output.router_logits])
        margins_LBT = good_margins(logits_LBT2)
        # The language-model losses of a step's batches add up to the step's, and the model weights
        # its other losses alike. A row without a share of the step must not count.
        counts = float(batch.share_of_step > 0)
        loss = counts * output.loss
        names = ("lm_loss", "aux_loss", "quality_loss")
        parts = {name: counts * output[name] for name in names if output.get(name) is not None}
        if len(batch.token_ids_BT) > batch.num_real:
            contrast = contrastive_parts(margins_LBT, batch)
            loss = loss + self.loss_weight * weighted(contrast, self.label_weight)
            parts |= contrast
        return MicroLoss(loss, _detached(parts), margins_LBT.detach())


def contrastive_parts(margins_LBT: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Both forms of the contrastive loss, as shares of the step's."""
    margins_B = row_margins(margins_LBT, batch)
    half = batch.num_real
    labels_B = torch.arange(len(margins_B), device=margins_B.device) < half
    pairs_B = torch.arange(half, device=margins_B.device).repeat(2)
    return {
        f"{form}_loss": batch.share_of_step
        * contrastive(margins_B, labels_B, pair_ids=pairs_B, form=form)
        for form in ("label", "ranking")
    }


def weighted(parts: Mapping[str, Tensor], label_weight: float) -> Tensor:
    return label_weight * parts["label_loss"] + (1 - label_weight) * parts["ranking_loss"]


def row_margins(margins_LBT: Tensor, batch: MicroBatch) -> Tensor:
    """Mean over layers and answer tokens: float32 [B]; its sigmoid is the score."""
    mask_BT = answer_tokens(batch).float()
    return (margins_LBT.mean(0) * mask_BT).sum(1) / mask_BT.sum(1)


def answer_tokens(batch: MicroBatch) -> Tensor:
    """Mask of the tokens that a score averages: [B, T]."""
    return scored_tokens(batch.answer_mask_BT, batch.attention_mask_BT, "answer")


def _detached(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in parts.items()}
