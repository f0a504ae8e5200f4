"""A margin is read against margins of answers of similar length."""

import numpy as np
import pytest

from selectmoe.errors import DataError
from selectmoe.scoring.length_adjustment import as_json, fit_length_adjustment, from_json


def margins_by_length(num_rows: int = 8_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Short answers have higher margins that vary more, as those of a tiny selector."""
    draws = np.random.default_rng(seed)
    counts = np.exp(draws.uniform(np.log(2), np.log(900), num_rows)).astype(int)
    return draws.normal(3 - 0.3 * np.log(counts), 0.5 + 4 / counts), counts


def test_adjusted_margins_have_one_mean_and_deviation_at_every_length():
    margins, counts = margins_by_length()
    adjustment = fit_length_adjustment(margins, counts)
    fresh, lengths = margins_by_length(seed=1)
    adjusted = adjustment.adjust(fresh, lengths)
    for first, last in ((2, 3), (4, 10), (11, 50), (51, 200), (201, 900)):
        rows = (lengths >= first) & (lengths <= last)
        # Standard errors of about .02 to .03; the kernel smooths the steep end of the deviation.
        assert adjusted[rows].mean() == pytest.approx(margins.mean(), abs=0.15)
        assert adjusted[rows].std() == pytest.approx(margins.std(), rel=0.2)


def test_the_order_within_a_length_stays():
    adjustment = fit_length_adjustment(*margins_by_length(1_000))
    margins = np.linspace(-3, 6, 50)
    for count in (1, 7, 5_000):
        assert (np.diff(adjustment.adjust(margins, np.full(50, count))) > 0).all()


def test_beyond_the_lengths_of_the_corpus_the_adjustment_is_that_of_its_ends():
    adjustment = fit_length_adjustment([0.0, 1.0, 2.0, 1.0], [10, 10, 20, 20])
    assert adjustment.adjust([1.0], [1]) == adjustment.adjust([1.0], [10])
    assert adjustment.adjust([1.0], [9_999]) == adjustment.adjust([1.0], [20])


def test_sparse_lengths_are_pooled():
    """One long row among hundreds of short ones has no deviation of its own."""
    margins, counts = margins_by_length(500)
    with_one_long = fit_length_adjustment([*margins, 9.0], [*counts, 30_000])
    assert with_one_long.deviations[-1] > 0.3
    assert with_one_long.means[-1] < 4


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_a_few_rows_are_enough(num_rows):
    adjustment = fit_length_adjustment(np.arange(num_rows), 3 + np.arange(num_rows))
    assert np.isfinite(adjustment.adjust([0.0, 100.0], [1, 1_000])).all()


def test_equal_margins_are_no_division_by_zero():
    adjustment = fit_length_adjustment([1.0] * 20, [5] * 20)
    assert adjustment.adjust([1.0], [5]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spread": 0}, "'spread' must be finite, above 0, got 0"),
        ({"center": float("nan")}, "'center' must be finite, got nan"),
        ({"deviations": [1.0, 0.0]}, "'deviations' must be above 0, got 0.0"),
        ({"means": [1.0]}, r"'means' must be as many as num_tokens \(2\), got 1"),
        ({"num_tokens": [9.0, 3.0]}, "'num_tokens' must be ascending, at least 1"),
        ({"num_tokens": []}, "'num_tokens' must be a list of numbers"),
        ({"means": ["high", 1.0]}, "'means' must be numbers"),
        ({"more": 1}, "must be a JSON object with the keys"),
    ],
)
def test_a_broken_adjustment_is_refused(changes, message):
    content = as_json(fit_length_adjustment([0.0, 1.0], [3, 9]))
    content |= {"num_tokens": [3.0, 9.0], "means": [0.0, 1.0], "deviations": [1.0, 1.0]}
    with pytest.raises(DataError, match=message):
        from_json(content | changes)
