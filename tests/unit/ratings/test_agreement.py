"""Agreement of signals with ratings, against plain counts and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from selectmoe.ratings import agreement
from selectmoe.ratings.agreement import Comparisons


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    good = random.random(200) > 0.4
    values = np.round(good + random.normal(size=200), 1)  # with ties
    lengths = random.integers(1, 60, size=200)
    prompts = [str(number // 2) for number in range(200)]
    return good, values, lengths, prompts


def test_of_rows_rated_alone_it_is_the_auroc(rows, monkeypatch):
    good, values, lengths, prompts = rows
    compared = Comparisons.of(good, [], lengths, prompts, seed=0)
    found = compared.agreement(values)
    assert found.estimate == pytest.approx(roc_auc_score(good, values))
    assert found.num_compared == good.sum() * (~good).sum()
    assert found.low < found.estimate < found.high
    monkeypatch.setattr(agreement, "MAX_COMPARISONS", 100)
    assert compared.agreement(values).estimate == pytest.approx(found.estimate)


def test_rows_of_like_length_are_compared_by_themselves(rows):
    good, values, lengths, prompts = rows
    right = counted = 0
    for one in np.flatnonzero(good):
        for other in np.flatnonzero(~good):
            low, high = sorted((lengths[one], lengths[other]))
            if low >= 0.8 * high:
                counted += 1
                right += (values[one] > values[other]) + 0.5 * (values[one] == values[other])
    compared = Comparisons.of(good, [], lengths, prompts, seed=0)
    found = compared.agreement(values, like_length=True)
    assert found.num_compared == counted
    assert found.estimate == pytest.approx(right / counted)
    none_alike = Comparisons.of(good[:2] ^ [True, False], [], np.array([1, 9]), prompts[:2], seed=0)
    assert none_alike.agreement(values[:2], like_length=True) is None


def test_of_pairs_it_is_the_share_that_is_ranked_right():
    values = np.array([2.0, 1.0, 1.0, 1.0, 0.0, 3.0])
    lengths = np.array([10, 10, 10, 50, 10, 9])
    pairs, prompts = [(0, 1), (2, 3), (4, 5)], ["a", "a", "b", "b", "c", "c"]
    compared = Comparisons.of([True, False] * 3, pairs, lengths, prompts, seed=0)
    found = compared.agreement(values)
    assert (found.estimate, found.num_compared) == (0.5, 3)
    alike = compared.agreement(values, like_length=True)
    assert (alike.estimate, alike.num_compared) == (0.5, 2)


def test_an_interval_is_wider_where_rows_share_prompts(rows):
    good, _, lengths, _ = rows
    same = np.repeat(np.arange(20), 10)
    values = good + np.random.default_rng(1).normal(size=20)[same]
    one_each = Comparisons.of(good, [], lengths, [str(n) for n in range(200)], seed=0)
    grouped = Comparisons.of(good, [], lengths, [str(n) for n in same], seed=0)
    narrow, wide = (compared.agreement(values) for compared in (one_each, grouped))
    assert wide.high - wide.low > narrow.high - narrow.low
    again = Comparisons.of(good, [], lengths, [str(n) for n in same], seed=0)
    assert again.agreement(values) == wide
