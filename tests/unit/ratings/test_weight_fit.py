"""Fitted weights against scikit-learn and known weights."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from selectmoe.errors import DataError
from selectmoe.ratings.agreement import Comparisons
from selectmoe.ratings.weight_fit import cross_validate, fit_weights

TRUE_WEIGHTS = np.array([2.0, -1.0, 0.0])
SCALES = np.array([1.0, 50.0, 0.01])


def made_rows(num_rows=4_000, seed=0):
    """Signals of very different scale, and labels by the true weights of standardized signals."""
    random = np.random.default_rng(seed)
    standardized = random.normal(size=(num_rows, 3))
    chances = 1 / (1 + np.exp(-standardized @ TRUE_WEIGHTS))
    return 3 + standardized * SCALES, random.random(num_rows) < chances


def test_known_weights_are_found_whatever_the_scale_of_a_signal():
    signals, good = made_rows()
    fit = fit_weights(signals, good, None)
    np.testing.assert_allclose(fit.weights_S, TRUE_WEIGHTS, rtol=0, atol=0.15)
    np.testing.assert_allclose(fit.deviations_S, SCALES, rtol=0.05)
    standardized = (signals - signals.mean(0)) / signals.std(0)
    plain = LogisticRegression().fit(standardized, good)
    np.testing.assert_allclose(fit.weights_S, plain.coef_[0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        fit.values(signals), plain.decision_function(standardized), rtol=0, atol=1e-2
    )


def test_pairs_are_fitted_on_differences():
    random = np.random.default_rng(0)
    signals = random.normal(size=(8_000, 3)) * SCALES
    pairs = np.arange(8_000).reshape(-1, 2)
    gains = ((signals[pairs[:, 0]] - signals[pairs[:, 1]]) / SCALES) @ TRUE_WEIGHTS
    is_first = random.random(4_000) < 1 / (1 + np.exp(-gains))
    pairs[~is_first] = pairs[~is_first, ::-1]
    good = np.zeros(8_000, dtype=bool)
    good[pairs[:, 0]] = True
    fit = fit_weights(signals, good, pairs)
    np.testing.assert_allclose(fit.weights_S, TRUE_WEIGHTS, rtol=0, atol=0.15)
    # What rows of one prompt have in common counts for nothing.
    shifted = signals + np.repeat(random.normal(size=(4_000, 3)), 2, axis=0)
    common = fit_weights(shifted, good, np.argsort(np.argsort(pairs.ravel())).reshape(-1, 2))
    assert np.isfinite(common.weights_S).all()


def test_a_signal_that_never_changes_gets_no_weight():
    signals, good = made_rows(300)
    signals[:, 2] = 7
    assert fit_weights(signals, good, None).weights_S[2] == 0


def test_cross_validation_tells_noise_from_a_signal_and_keeps_prompts_together():
    random = np.random.default_rng(0)
    prompts = [str(number // 4) for number in range(240)]
    # A name of each prompt tells its label, but not that of another prompt.
    good = (np.arange(240) // 4) % 2 == 0
    names = random.normal(size=(240 // 4, 40)).repeat(4, axis=0)
    values = cross_validate(names, good, None, prompts, num_folds=5, seed=0)
    compared = Comparisons.of(good, [], np.ones(240), prompts, seed=0)
    assert 0.3 < compared.agreement(values).estimate < 0.7
    in_sample = fit_weights(names, good, None).values(names)
    assert compared.agreement(in_sample).estimate > 0.95
    signals, good = made_rows(240)
    values = cross_validate(signals, good, None, prompts, num_folds=5, seed=0)
    compared = Comparisons.of(good, [], np.ones(240), prompts, seed=0)
    assert compared.agreement(values).estimate > 0.8
    assert np.isfinite(values).all()


def test_rows_of_one_prompt_cannot_be_cross_validated():
    signals, good = made_rows(40)
    with pytest.raises(DataError, match="cross-validation needs good rows of at least two prompts"):
        cross_validate(signals, good, None, ["same"] * 40, num_folds=5, seed=0)
