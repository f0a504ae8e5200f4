"""The formulas, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from selectmoe.scoring.formulas import (
    SCORE_FORMULAS,
    counted_tokens,
    good_margins,
    layer_scores,
    packed_layer_scores,
    sample_scores,
    scored_tokens,
    token_scores,
)

# Two layers, one sample, three tokens of which the last two are the answer.
MARGINS_LBT = torch.tensor([[[4.0, 2.0, 0.0]], [[4.0, -2.0, -4.0]]])
ANSWER_BT = torch.tensor([[False, True, True]])
ALL_BT = torch.ones(1, 3, dtype=torch.bool)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


EXPECTED = {
    "original": (2 * sigmoid(4) + sigmoid(2) + 0.5 + sigmoid(-2) + sigmoid(-4)) / 6,
    "answer_probability": (sigmoid(2) + 0.5 + sigmoid(-2) + sigmoid(-4)) / 4,
    "answer_margin": sigmoid((2 + 0 - 2 - 4) / 4),
    "answer_margin_second_half": sigmoid((-2 - 4) / 2),
    "answer_margin_last": sigmoid((-2 - 4) / 2),
}


@pytest.mark.parametrize("name", SCORE_FORMULAS)
def test_formula_gives_the_number_worked_out_by_hand(name):
    formula = SCORE_FORMULAS[name]
    mask_BT = scored_tokens(ANSWER_BT, ALL_BT, formula.tokens)
    [score] = sample_scores(layer_scores(MARGINS_LBT, mask_BT, formula), formula).tolist()
    assert score == pytest.approx(EXPECTED[name], abs=1e-6)


@pytest.mark.parametrize("name", SCORE_FORMULAS)
def test_scores_of_the_tokens_that_count_average_to_the_score(name):
    formula = SCORE_FORMULAS[name]
    mask_BT = scored_tokens(ANSWER_BT, ALL_BT, formula.tokens)
    counted = token_scores(MARGINS_LBT, formula)[mask_BT]
    averages_margins = formula.average == "margin"
    again = counted.logit().mean().sigmoid() if averages_margins else counted.mean()
    assert again.item() == pytest.approx(EXPECTED[name], abs=1e-6)


def test_margin_is_the_logit_of_the_good_probability():
    logits = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(good_margins(logits).sigmoid(), logits.softmax(-1)[..., 0])


def test_a_sample_without_answer_tokens_is_scored_on_all_its_tokens():
    attention_BT = torch.tensor([[True, True, False]])
    mask = scored_tokens(torch.zeros(1, 3, dtype=torch.bool), attention_BT, "answer")
    assert mask.tolist() == attention_BT.tolist()


@pytest.mark.parametrize("name", SCORE_FORMULAS)
def test_samples_end_to_end_have_the_layer_scores_of_padded_ones(name):
    formula = SCORE_FORMULAS[name]
    shorter_LBT = torch.tensor([[[1.0, -3.0, 0.0]], [[2.0, 5.0, 0.0]]])
    margins_LBT = torch.cat([MARGINS_LBT, shorter_LBT], dim=1)
    attention_BT = torch.tensor([[True, True, True], [True, True, False]])
    answer_BT = torch.tensor([[False, True, True], [False, False, False]])
    expected = layer_scores(
        margins_LBT, scored_tokens(answer_BT, attention_BT, formula.tokens), formula
    )
    counts = [
        counted_tokens(answer_BT[row, :length].numpy(), formula.tokens)
        for row, length in ((0, 3), (1, 2))
    ]
    margins_LN = torch.cat([margins_LBT[:, 0], margins_LBT[:, 1, :2]], dim=1)
    counts_N = torch.from_numpy(np.concatenate(counts)).float()
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    found = packed_layer_scores(margins_LN, counts_N, cu_seqlens, formula)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
