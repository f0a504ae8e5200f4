"""Models and rows of bench_scoring.py."""

import pytest

from benchmarks.scoring_shapes import OLMOE_1B_7B, flop_per_token, load_subject, require_memory
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR


def test_flop_per_token_of_olmoe_1b_7b_agree_with_the_cost_model():
    config = SelectMoeConfig(**OLMOE_1B_7B)
    # 16 x (33.55 M of projections + 0.27 M of router and gate) + 15 x 100.66 M of experts
    assert flop_per_token(config, [1]) == pytest.approx(2.051e9, rel=1e-3)
    # In a row of 371 tokens, each attends to 186 on average, in 16 layers, for 4 x 2,048 FLOP.
    more = flop_per_token(config, [371]) - flop_per_token(config, [1])
    assert more == pytest.approx(16 * 4 * 2_048 * 185)


def test_a_model_that_does_not_fit_in_memory_is_rejected_in_one_line():
    config = SelectMoeConfig(**{**OLMOE_1B_7B, "vocab_size": 10**9})
    with pytest.raises(
        SystemExit, match=r"^error: --shape huge needs \d+\.\d GB .*cpu has .* GB free$"
    ):
        require_memory("huge", config, "cpu")


def test_the_tiny_shape_has_random_weights_and_rows_of_the_corpus():
    subject = load_subject(
        "tiny", data=str(DEMO_CORPUS), num_rows=3, device="cpu", model=EMBEDDED_SELECTOR
    )
    assert len(subject.rows) == len(subject.samples) == 3
    assert subject.model.config.hidden_size == 128
    assert all(0 < row.token_ids.max() < 4_096 for row in subject.rows)
