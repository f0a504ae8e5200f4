"""Gates that only read are fitted to their inputs, which are computed once."""

from random import Random

import numpy as np
import pytest
import torch

from selectmoe.corruptions.kinds import corrupt
from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.scoring.formulas import sample_margins
from selectmoe.warmup.gate_features import gate_features
from selectmoe.warmup.gate_fit import LinearGates, fit_gates, fit_logistic, labels, set_gates


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return [row for row in rows if row.dataset == "demo"][:60]


@pytest.fixture
def engine() -> ScoringEngine:
    """Whose gates only read, in a model of its own."""
    engine = ScoringEngine.from_pretrained(device="cpu", length="raw")
    engine.model.force_gates_open()
    return engine


def margins(engine: ScoringEngine, samples: list[Sample]) -> np.ndarray:
    layers_BL = np.array([scored.layer_scores for scored in engine.score(samples)])
    return sample_margins(layers_BL, engine.formula)


def test_margins_of_fitted_gates_are_those_of_the_engine(engine, samples):
    features_NLH = gate_features(engine.model, engine.tokenizer.tokenize(samples))
    draws = np.random.default_rng(0)
    gates = LinearGates(
        draws.normal(0, 0.1, features_NLH.shape[1:]), biases_L=np.arange(len(features_NLH[0]))
    )
    set_gates(engine.model, gates)
    # float32 sums over a few hundred tokens
    np.testing.assert_allclose(
        gates.margins(features_NLH), margins(engine, samples), rtol=0, atol=1e-4
    )


def test_fitted_gates_tell_rows_from_copies_that_they_never_saw(engine, samples):
    random = Random(0)
    copies = [
        corrupt(row, kind=random.choice(("gibberish", "punctuation")), seed=n, donors=samples)
        for n, row in enumerate(samples)
    ]
    assert None not in copies
    real_NLH, copies_NLH = (
        gate_features(engine.model, engine.tokenizer.tokenize(part)) for part in (samples, copies)
    )
    gates = fit_gates(real_NLH[:40], copies_NLH[:40], np.ones(40), penalty=1e-3)
    set_gates(engine.model, gates)
    assert margins(engine, samples[40:]).min() > np.quantile(margins(engine, copies[40:]), 0.9)


def test_every_layer_has_the_same_mean_margin_of_real_rows():
    draws = np.random.default_rng(0)
    real, copies = draws.normal(1, 1, (50, 4, 3)), draws.normal([[[-1]], [[2]]] * 25, 1, (50, 4, 3))
    gates = fit_gates(real, copies, np.ones(50), penalty=1e-2)
    by_layer = np.einsum("nlh,lh->nl", real, gates.weights_LH) + gates.biases_L
    assert by_layer.mean(axis=0) == pytest.approx(by_layer.mean())


def test_a_copy_without_weight_changes_nothing():
    draws = np.random.default_rng(0)
    real, copies = draws.normal(1, 1, (50, 2, 3)), draws.normal(-1, 1, (50, 2, 3))
    weights = np.r_[np.ones(40), np.zeros(10)]
    with_more = fit_gates(real, copies, weights, penalty=1e-2)
    without = fit_gates(real, copies[:40], weights[:40], penalty=1e-2)
    np.testing.assert_allclose(with_more.weights_LH, without.weights_LH, rtol=0, atol=1e-6)


def test_features_under_autocast_are_averaged_in_float32(engine, samples):
    rows = engine.tokenizer.tokenize(samples[:4])
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.from_numpy(gate_features(engine.model, rows))
    assert not torch.equal(features, features.bfloat16().float())


def test_a_regression_in_float32_gives_the_weights_of_float64():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=draws, dtype=torch.float64)
    signs, weights = labels(30, torch.ones(30))
    exact = fit_logistic(features, signs, weights, penalty=1e-2)
    single = fit_logistic(*(part.float() for part in (features, signs, weights)), penalty=1e-2)
    assert single.weights_R.dtype == torch.float32
    # L-BFGS ends where a step changes the loss by less than rounding.
    torch.testing.assert_close(single.weights_R.double(), exact.weights_R, rtol=0, atol=1e-3)
