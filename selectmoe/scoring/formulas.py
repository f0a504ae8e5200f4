"""Score formulas: pure functions from the gates' logits to one score per sample."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# A mean of float32 probabilities can round to 0 or 1, whose log-odds are infinite.
SMALLEST_PROBABILITY = 2.0**-24

# Shape letters: L = layers, B = samples, T = tokens of a sample, N = tokens of packed samples. A
# gate has 2 logits, index 0 is "good".


@dataclass(frozen=True, slots=True)
class ScoreFormula:
    """Which tokens and layers a score averages, and what it averages.

    With margin = logit(good) - logit(trash) of one gate at one token:
    "probability" is the mean of sigmoid(margin); "margin" is sigmoid of the mean of margin, which
    does not flatten out where gates are nearly open.
    """

    tokens: Literal["answer", "all"]
    layers: Literal["all", "second_half", "last"]
    average: Literal["probability", "margin"]


SCORE_FORMULAS = {
    # The formula of the first Select-MoE code: every token, every layer, mean good-probability.
    "original": ScoreFormula("all", "all", "probability"),
    "answer_probability": ScoreFormula("answer", "all", "probability"),
    "answer_margin": ScoreFormula("answer", "all", "margin"),
    "answer_margin_second_half": ScoreFormula("answer", "second_half", "margin"),
    "answer_margin_last": ScoreFormula("answer", "last", "margin"),
}


def good_margins(gate_logits_LBT2: Tensor) -> Tensor:
    """Good logit minus trash logit, float32 [L, B, T]; its sigmoid is the good-probability."""
    return (gate_logits_LBT2[..., 0] - gate_logits_LBT2[..., 1]).float()


def scored_tokens(answer_mask_BT: Tensor, attention_mask_BT: Tensor, tokens: str) -> Tensor:
    """Mask of the tokens that count.

    All tokens of a sample without an answer token count; `refuse_cut_answer` lets none reach this.
    """
    if tokens == "all":
        return attention_mask_BT
    has_answer_B1 = answer_mask_BT.any(dim=1, keepdim=True)
    return torch.where(has_answer_B1, answer_mask_BT, attention_mask_BT)


def layer_scores(margins_LBT: Tensor, mask_BT: Tensor, formula: ScoreFormula) -> Tensor:
    """Average of each layer by itself over the tokens of `mask_BT`: [B, L].

    Probabilities, or margins where the formula averages those.
    """
    averaged_LBT = margins_LBT.sigmoid() if formula.average == "probability" else margins_LBT
    weights_BT = mask_BT.to(averaged_LBT.dtype)
    sums_BL = torch.einsum("lbt,bt->bl", averaged_LBT, weights_BT)
    return sums_BL / weights_BT.sum(dim=1, keepdim=True)


def counted_tokens(answer_mask: np.ndarray, tokens: str) -> np.ndarray:
    """As `scored_tokens`, for one sample."""
    return answer_mask if tokens == "answer" and answer_mask.any() else np.ones_like(answer_mask)


def packed_layer_scores(
    margins_LN: Tensor, counts_N: Tensor, cu_seqlens_B1: Tensor, formula: ScoreFormula
) -> Tensor:
    """As `layer_scores`, for packed samples: [B, L]; NaN for a sample without tokens.

    counts_N: 1 for a token that counts, else 0, in the dtype of the margins.
    """
    averaged_LN = margins_LN.sigmoid() if formula.average == "probability" else margins_LN
    summed = torch.cat([averaged_LN, torch.ones_like(margins_LN[:1])]).T.contiguous()
    # Each bag is summed in the order of its tokens. Scatter-adds on CUDA have no order, so two runs
    # would differ.
    sums = functional.embedding_bag(
        torch.arange(len(summed), device=summed.device),
        summed,
        cu_seqlens_B1[:-1].long(),
        mode="sum",
        per_sample_weights=counts_N,
    )
    return sums[:, :-1] / sums[:, -1:]


def sample_scores(layer_scores_BL: Tensor, formula: ScoreFormula) -> Tensor:
    """One score a sample in (0, 1): [B]."""
    first = _first_layer(layer_scores_BL.shape[1], formula)
    mean_B = layer_scores_BL[:, first:].mean(dim=1)
    return mean_B if formula.average == "probability" else mean_B.sigmoid()


def num_averaged_tokens(num_answer_tokens: int, num_tokens: int, formula: ScoreFormula) -> int:
    """The number of tokens that a sample's score averages, by `counted_tokens`."""
    only_answer = formula.tokens == "answer" and num_answer_tokens > 0
    return num_answer_tokens if only_answer else num_tokens


def sample_margins(layer_scores_BL: np.ndarray, formula: ScoreFormula) -> np.ndarray:
    """The mean margin of each sample, or the log-odds of its mean good-probability, which is what
    `sample_scores` takes the sigmoid of: float64 (B,)."""
    first = _first_layer(layer_scores_BL.shape[1], formula)
    means_B: np.ndarray = layer_scores_BL[:, first:].mean(axis=1, dtype=np.float64)
    if formula.average == "margin":
        return means_B
    probabilities_B = np.clip(means_B, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    log_odds_B: np.ndarray = np.log(probabilities_B) - np.log1p(-probabilities_B)
    return log_odds_B


def token_scores(margins_LBT: Tensor, formula: ScoreFormula) -> Tensor:
    """What the formula gives for each token by itself, in (0, 1): [B, T]."""
    chosen_LBT = margins_LBT[_first_layer(margins_LBT.shape[0], formula) :]
    if formula.average == "probability":
        return chosen_LBT.sigmoid().mean(dim=0)
    return chosen_LBT.mean(dim=0).sigmoid()


def _first_layer(num_layers: int, formula: ScoreFormula) -> int:
    return {"all": 0, "second_half": num_layers // 2, "last": num_layers - 1}[formula.layers]
