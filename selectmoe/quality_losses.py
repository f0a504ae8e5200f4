"""Losses on good-probabilities: pure functions, each with a gradient that reaches the gate.

The distribution losses take the good-probabilities of every gate at every token, and say what they
should look like as a whole. Only `contrastive` has an ordering signal: it is told which rows are
real and which are worse copies.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape letters: L = any leading dimensions (layers), B = samples, T = tokens, P = pairs.


def masked_mean(values_LBT: Tensor, mask_BT: Tensor, *, sample_wise_averaging: bool) -> Tensor:
    """Mean over the tokens of `mask_BT` and all leading dimensions: a scalar.

    sample_wise_averaging: averages a sample's tokens first, then samples, so that a long sample
    counts no more than a short one. A sample without any token in the mask counts in neither way.
    """
    weights_BT = mask_BT.to(values_LBT.dtype)
    if not sample_wise_averaging:
        return (values_LBT * weights_BT).sum() / (weights_BT.sum() * _leading(values_LBT))
    num_tokens_B = weights_BT.sum(dim=-1)
    means_LB = (values_LBT * weights_BT).sum(dim=-1) / num_tokens_B.clamp(min=1)
    num_samples = (num_tokens_B > 0).sum()
    return means_LB.sum() / (num_samples * _leading(values_LBT))


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
    target has two peaks: most gates nearly open or nearly shut.
    """
    target_mean = alpha / (alpha + beta)
    target_variance = target_mean * (1 - target_mean) / (alpha + beta + 1)
    mean, variance = _moments(good_LBT, mask_BT, sample_wise_averaging)
    return (mean - target_mean).square() + (variance - target_variance).square()


def mean_variance_regularization(
    good_LBT: Tensor,
    mask_BT: Tensor,
    *,
    target_mean: float = 0.5,
    variance_weight: float = 1.0,
    sample_wise_averaging: bool = True,
) -> Tensor:
    """(mean - target_mean)^2 - variance_weight * variance: a kept share, and tokens told apart."""
    mean, variance = _moments(good_LBT, mask_BT, sample_wise_averaging)
    return (mean - target_mean).square() - variance_weight * variance


def contrastive(
    margins_B: Tensor,
    labels_B: Tensor,
    *,
    pair_ids: Tensor | None = None,
    form: Literal["label", "ranking"] = "label",
    temperature: float = 1.0,
) -> Tensor:
    """Real samples above worse copies, from one margin (mean gate logit difference) a row.

    labels_B: True for real rows. With s = margins / temperature:
    "label": binary cross-entropy of sigmoid(s); "ranking": mean of softplus(s[copy] - s[real])
    over every real row and copy that share a number in `pair_ids` (Burges et al. 2005, RankNet).
    """
    scaled_B = margins_B / temperature
    if form == "label":
        return F.binary_cross_entropy_with_logits(scaled_B, labels_B.to(scaled_B.dtype))
    if pair_ids is None:
        raise ValueError("form='ranking' needs pair_ids: which copy belongs to which sample")
    real = labels_B.bool()
    differences_RC = scaled_B[~real][None, :] - scaled_B[real][:, None]
    paired_RC = pair_ids[real][:, None] == pair_ids[~real][None, :]
    return F.softplus(differences_RC)[paired_RC].mean()


def _moments(
    good_LBT: Tensor, mask_BT: Tensor, sample_wise_averaging: bool
) -> tuple[Tensor, Tensor]:
    mean = masked_mean(good_LBT, mask_BT, sample_wise_averaging=sample_wise_averaging)
    squares = masked_mean(good_LBT.square(), mask_BT, sample_wise_averaging=sample_wise_averaging)
    return mean, squares - mean.square()


def _leading(values_LBT: Tensor) -> int:
    """How many [B, T] slices there are."""
    return int(torch.Size(values_LBT.shape[:-2]).numel())


QUALITY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "linear": linear,
    "mse": mse,
    "beta_moment_matching": beta_moment_matching,
    "mean_variance_regularization": mean_variance_regularization,
}
"""Losses of `SelectMoeConfig.quality_loss_type`; `contrastive` needs pairs, so warm-up calls it."""
