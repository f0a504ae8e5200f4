"""Losses on the gates' good-probabilities: pure functions with a gradient at the gates.

The distribution losses take the good-probabilities of every gate at every token, and say what they
should look like as a whole. Only `contrastive` has an ordering signal: it is told which rows are
real and which are corrupted copies.

A batch with nothing to average (no token in the mask, no row, no pair) has the loss 0 and no
gradient, never NaN: one such batch on one of many workers must not end a training run.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape letters: L = any leading dimensions (layers), B = samples, T = tokens; R, C = the real rows
# and the copies among B.
ContrastiveForm = Literal["label", "ranking"]


def masked_mean(values_LBT: Tensor, mask_BT: Tensor, *, sample_wise_averaging: bool) -> Tensor:
    """Mean over the tokens of `mask_BT` and all leading dimensions: a scalar.

    sample_wise_averaging: averages a sample's tokens first, then samples, so that a long sample
    counts no more than a short one. A sample without any token in the mask counts in neither way,
    and where no sample has one the mean is 0.
    """
    mask_BT = mask_BT.bool()
    sums_LB = values_LBT.masked_fill(~mask_BT, 0).sum(dim=-1)  # 0 * NaN would be NaN
    num_tokens_B = mask_BT.sum(dim=-1)
    if sample_wise_averaging:
        sums_LB = sums_LB / num_tokens_B.clamp(min=1)
        count = (num_tokens_B > 0).sum()
    else:
        count = num_tokens_B.sum()
    num_layers = torch.Size(values_LBT.shape[:-2]).numel()
    return sums_LB.sum() / (count.clamp(min=1) * num_layers)


def sigmoid(good_LBT: Tensor, mask_BT: Tensor, *, sample_wise_averaging: bool = True) -> Tensor:
    """mean(sigmoid(good)): the first Select-MoE code's loss; it pushes every gate shut a little."""
    return masked_mean(good_LBT.sigmoid(), mask_BT, sample_wise_averaging=sample_wise_averaging)


def linear(good_LBT: Tensor, mask_BT: Tensor, *, sample_wise_averaging: bool = True) -> Tensor:
    """mean(good): a constant price for every token that goes to the experts."""
    return masked_mean(good_LBT, mask_BT, sample_wise_averaging=sample_wise_averaging)


def mse(
    good_LBT: Tensor, mask_BT: Tensor, *, target: float = 0.5, sample_wise_averaging: bool = True
) -> Tensor:
    """mean((good - target)^2)."""
    squared_LBT = (good_LBT - target).square()
    return masked_mean(squared_LBT, mask_BT, sample_wise_averaging=sample_wise_averaging)


def beta_moment_matching(
    good_LBT: Tensor,
    mask_BT: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    sample_wise_averaging: bool = True,
) -> Tensor:
    """(mean - m)^2 + (variance - v)^2 with the mean and variance of Beta(alpha, beta).

    m = alpha / (alpha + beta) and v = m (1 - m) / (alpha + beta + 1). With both below 1 the
    target has two peaks: most gates nearly open or nearly shut. Mean and variance are those of
    all good-probabilities together, weighted as `sample_wise_averaging` weights tokens.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"alpha and beta must be above 0, got {alpha} and {beta}")
    target_mean = alpha / (alpha + beta)
    target_variance = target_mean * (1 - target_mean) / (alpha + beta + 1)
    mean, variance = _moments(good_LBT, mask_BT, sample_wise_averaging)
    loss = (mean - target_mean).square() + (variance - target_variance).square()
    return loss * mask_BT.any()


def mean_variance_regularization(
    good_LBT: Tensor,
    mask_BT: Tensor,
    *,
    target_mean: float = 0.5,
    variance_weight: float = 1.0,
    sample_wise_averaging: bool = True,
) -> Tensor:
    """(mean - target_mean)^2 - variance_weight * variance: a kept share, and tokens told apart.

    Mean and variance as in `beta_moment_matching`.
    """
    mean, variance = _moments(good_LBT, mask_BT, sample_wise_averaging)
    return ((mean - target_mean).square() - variance_weight * variance) * mask_BT.any()


def contrastive(
    margins_B: Tensor,
    labels_B: Tensor,
    *,
    pair_ids: Tensor | None = None,
    form: ContrastiveForm = "label",
    temperature: float = 1.0,
) -> Tensor:
    """Real samples above corrupted copies, from one margin (mean gate logit difference) a row.

    labels_B: True for real rows. With s = margins / temperature:
    "label": binary cross-entropy of sigmoid(s); "ranking": mean of softplus(s[copy] - s[real])
    over every real row and copy that share a number in `pair_ids` (Burges et al. 2005, RankNet).
    """
    if form not in get_args(ContrastiveForm):
        raise ValueError(
            f"form must be one of {', '.join(get_args(ContrastiveForm))}, got {form!r}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    scaled_B = margins_B / temperature
    if form == "label":
        losses_B = F.binary_cross_entropy_with_logits(
            scaled_B, labels_B.to(scaled_B.dtype), reduction="none"
        )
        return losses_B.sum() / max(losses_B.numel(), 1)
    if pair_ids is None:
        raise ValueError("form='ranking' needs pair_ids: which copy belongs to which sample")
    real = labels_B.bool()
    differences_RC = scaled_B[~real][None, :] - scaled_B[real][:, None]
    paired_RC = pair_ids[real][:, None] == pair_ids[~real][None, :]
    return F.softplus(differences_RC)[paired_RC].sum() / paired_RC.sum().clamp(min=1)


def _moments(
    good_LBT: Tensor, mask_BT: Tensor, sample_wise_averaging: bool
) -> tuple[Tensor, Tensor]:
    mean = masked_mean(good_LBT, mask_BT, sample_wise_averaging=sample_wise_averaging)
    # Around the mean: mean(good^2) - mean^2 would cancel where all gates are nearly open.
    deviations_LBT = (good_LBT - mean).square()
    return mean, masked_mean(deviations_LBT, mask_BT, sample_wise_averaging=sample_wise_averaging)


QUALITY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "linear": linear,
    "mse": mse,
    "beta_moment_matching": beta_moment_matching,
    "mean_variance_regularization": mean_variance_regularization,
}
"""Losses of `SelectMoeConfig.quality_loss_type`; `contrastive` needs pairs, so warm-up calls it."""
