import numpy as np
import pytest

from selectmoe.evaluation.task_results import (
    SampleValues,
    aggregate,
    influences,
    main_metric,
    standard_error,
    weighted_mean,
)


def samples(values, weights=None):
    weights = weights or [1.0] * len(values)
    return [
        SampleValues(str(n), {"m": value}, {"m": weight})
        for n, (value, weight) in enumerate(zip(values, weights, strict=True))
    ]


def test_equal_weights_give_the_mean_and_its_textbook_standard_error():
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    metric = aggregate(samples(values.tolist()), "m", higher_is_better=True)
    assert metric.value == pytest.approx(0.6)
    assert metric.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(5))


def test_weights_make_it_a_mean_over_tokens():
    metric = aggregate(samples([1.0, 3.0], [30, 10]), "m", higher_is_better=False)
    assert metric.value == pytest.approx((30 * 1 + 10 * 3) / 40)


def test_the_standard_error_of_a_ratio_is_what_redrawing_the_samples_gives():
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 200, size=60).astype(float)
    values = 3 + 20 / weights + rng.normal(size=60)
    computed = standard_error(influences(values, weights))
    draws = rng.integers(0, 60, size=(4_000, 60))
    redrawn = [weighted_mean(values[draw], weights[draw]) for draw in draws]
    # 4,000 draws know a standard deviation to 1.1 %; the formula itself is right to 1/60.
    assert computed == pytest.approx(np.std(redrawn), rel=0.06)


def test_one_sample_has_no_standard_error():
    assert aggregate(samples([1.0]), "m", higher_is_better=True).standard_error is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["acc", "acc_norm"], "acc_norm"),
        (["f1", "exact_match,strict-match"], "exact_match,strict-match"),
        (["nll_per_byte", "nll_per_token"], "nll_per_token"),
        (["bleu", "ter"], "bleu"),
    ],
)
def test_one_metric_stands_for_a_task(names, expected):
    assert main_metric(names) == expected
