"""Held-out margins by inner products are those of gates that are fitted without the held-out rows,
and choose the layers."""

import numpy as np
import pytest

from recipes.held_out_auroc import auroc
from selectmoe.errors import DataError
from selectmoe.warmup.feature_shards import RowFeatures
from selectmoe.warmup.gate_fit import fit_gates
from selectmoe.warmup.held_out import InnerProducts, copy_weights, rows_with_copies
from selectmoe.warmup.layer_choice import Window, best_window, choose_layers, windows

NUM_ROWS, NUM_LAYERS, HIDDEN = 60, 5, 8


def made_features(*, signal_layers=(2,), seed=0) -> RowFeatures:
    """Copies differ from rows in the given layers alone."""
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(NUM_ROWS, NUM_LAYERS, HIDDEN)).astype(np.float32)
    parents = np.repeat(np.arange(NUM_ROWS), 2)
    copies = draws.normal(size=(len(parents), NUM_LAYERS, HIDDEN)).astype(np.float32)
    copies[:, list(signal_layers)] -= 1
    return RowFeatures(rows, copies, parents)


def test_held_out_margins_are_those_of_gates_fitted_without_these_rows():
    features = made_features()
    [held_out] = InnerProducts.of(features).held_out(range(NUM_LAYERS), [1e-2], seed=3)
    [is_held, *_] = InnerProducts.of(features)._folds(3)
    rows, copies = is_held[:NUM_ROWS], is_held[NUM_ROWS:]
    # Standardized as there, by all rows: only the scale of the penalty depends on it.
    center, scale = features.rows_NLH.mean(0), features.rows_NLH.std(0, ddof=1)
    real, corrupted = ((part - center) / scale for part in (features.rows_NLH, features.copies_MLH))
    gates = fit_gates(
        real[~rows], corrupted[~copies], copy_weights(features.parents_M[~copies]), penalty=1e-2
    )
    # The gates standardize once more, by the rows they see; the margins move a little by it.
    np.testing.assert_allclose(held_out.rows_N[rows], gates.margins(real[rows]), atol=0.5)
    np.testing.assert_allclose(
        held_out.copies_M[copies], gates.margins(corrupted[copies]), atol=0.5
    )
    assert np.corrcoef(held_out.rows_N[rows], gates.margins(real[rows]))[0, 1] > 0.99
    assert held_out.auroc == pytest.approx(auroc(held_out.rows_N, held_out.copies_M))


def test_few_rows_with_many_features_give_the_gates_of_the_whole_regression(monkeypatch):
    features = made_features()
    arguments = (features.rows_NLH[:12], features.copies_MLH[:24], np.ones(24))
    reduced = fit_gates(*arguments, penalty=1e-2)  # 36 rows, 40 features
    monkeypatch.setattr(
        "selectmoe.warmup.gate_fit._reduced", lambda features_NF: (features_NF, lambda w: w)
    )
    whole = fit_gates(*arguments, penalty=1e-2)
    np.testing.assert_allclose(reduced.weights_LH, whole.weights_LH, atol=1e-4)
    np.testing.assert_allclose(reduced.biases_L, whole.biases_L, atol=1e-4)


def test_the_layers_that_tell_copies_from_rows_are_found_with_none_above_them():
    best, tried = choose_layers(made_features(signal_layers=(1, 2)), seed=0)
    assert best.last == 2
    assert best.first in (0, 1)
    assert {(window.first, window.last) for window in tried} == set(windows(NUM_LAYERS))


def test_of_windows_that_are_as_good_the_one_that_computes_least_is_chosen():
    tried = [Window(4, 9, 0.900), Window(2, 6, 0.893), Window(1, 6, 0.894), Window(0, 5, 0.885)]
    assert best_window(tried) == Window(1, 6, 0.894)


def test_windows_end_at_tenths_of_the_depth():
    assert set(windows(2)) == {(0, 0), (0, 1), (1, 1)}
    ends = {last for _, last in windows(30)}
    assert ends == {2, 5, 8, 11, 14, 17, 20, 23, 26, 29}


def test_all_copies_of_a_row_weigh_as_much_as_those_of_another():
    np.testing.assert_allclose(
        copy_weights(np.array([0, 0, 2, 2, 2, 3])), [1 / 2] * 2 + [1 / 3] * 3 + [1]
    )


def test_rows_without_a_copy_are_left_out():
    features = made_features()
    few = RowFeatures(features.rows_NLH, features.copies_MLH[:30], features.parents_M[:30])
    kept = rows_with_copies(few)
    assert kept.tolist() == list(range(15))
    assert few.some_rows(kept).parents_M.tolist() == few.parents_M.tolist()
    with pytest.raises(DataError, match="at least 10 rows that can be corrupted, got 5 of 60"):
        rows_with_copies(RowFeatures(few.rows_NLH, few.copies_MLH[:10], few.parents_M[:10]))
