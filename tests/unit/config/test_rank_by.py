"""What `selection.rank_by` may say."""

import pytest

from selectmoe.config.rank_by import RankWeight, parse_rank_by
from selectmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("pmi", {"pmi": 1}),
        ("-nll", {"nll": -1}),
        ("{gate: 1, pmi: 0.5}", {"gate": 1, "pmi": 0.5}),
        ("{'gate':1,\"nll\":-2e-1}", {"gate": 1, "nll": -0.2}),
    ],
)
def test_a_rank_is_a_signal_or_weights(text, weights):
    assert parse_rank_by(text) == {
        name: RankWeight(weight, None) for name, weight in weights.items()
    }


def test_a_deviation_may_be_given():
    assert parse_rank_by("{gate: 1, pmi: 0.5/0.31}")["pmi"] == RankWeight(0.5, 0.31)


@pytest.mark.parametrize(
    "text",
    ["taste", "", "{}", "{gate}", "{gate: x}", "{gate: nan}", "{gate: 1, gate: 2}", "{gate: 1/0}"],
)
def test_what_is_neither_is_refused(text):
    with pytest.raises(ConfigError, match="rank_by must be one of gate, length"):
        parse_rank_by(text)
    with pytest.raises(ConfigError, match="must have a weight other than 0"):
        parse_rank_by("{gate: 0}")
