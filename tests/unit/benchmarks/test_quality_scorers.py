"""bench_quality.py: its metrics on numbers checked by hand, its scorers on a real model."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality_scorers import (
    Selector,
    loss_scores,
    matched_auroc,
    pairs_right,
    probe_scores,
    scorer,
    without_question,
)
from benchmarks.quality_warmups import rank_correlations
from recipes.baseline_scores import answer_nll, load_language_model
from recipes.held_out_rows import is_held_out, is_test_row
from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return [row for row in rows if row.dataset == "demo"][:24]


def test_matching_lengths_reduces_a_length_scorer_to_chance():
    lengths = np.array([10, 10, 20, 20]), np.array([10, 20, 5, 5])
    assert matched_auroc(lengths[0], lengths[1], *lengths) == 0.5
    good, bad = np.array([3.0, 3.0, 3.0, 3.0]), np.array([1.0, 5.0, 9.0, 9.0])
    # Pairs of ten tokens: two right; of twenty: two wrong; the short copies have no match.
    assert matched_auroc(good, bad, *lengths) == 0.5
    assert matched_auroc(good[:1], bad[2:], lengths[0][:1], lengths[1][2:]) is None


def test_pair_accuracy_counts_ties_as_half():
    labels, pair_ids = np.array([True, False] * 3), ["a", "a", "b", "b", "c", "c"]
    scores = np.array([2.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    assert pairs_right(scores, labels, pair_ids) == pytest.approx(0.5)
    assert pairs_right(scores[:2], labels[:2], pair_ids[:2]) == 1.0


def test_rank_correlations_compare_seeds_with_seeds_and_halves_with_halves():
    scores = {"seed 1": [1, 2, 3], "seed 2": [2, 4, 9], "half 0": [1, 2, 3], "half 1": [3, 2, 1]}
    found = rank_correlations({name: np.array(row) for name, row in scores.items()})
    assert found == pytest.approx({"seed 1, seed 2": 1.0, "half 0, half 1": -1.0})


def test_half_of_the_held_out_rows_are_test_rows():
    held_out = [name for name in map(str, range(4_000)) if is_held_out(name)]
    test_rows = [name for name in held_out if is_test_row(name)]
    assert 0.4 < len(test_rows) / len(held_out) < 0.6
    assert not any(is_test_row(name) for name in map(str, range(4_000)) if name not in held_out)


@pytest.mark.parametrize("name", ["gate", "untrained gate", "length", "random"])
def test_a_scorer_gives_every_row_a_finite_score(name, samples):
    scores = scorer(name, Selector(folder=EMBEDDED_SELECTOR))(samples)
    assert scores.shape == (len(samples),)
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) > 5


def test_ifd_is_the_loss_with_the_question_divided_by_the_loss_without(samples):
    selector = Selector(folder=Path(EMBEDDED_SELECTOR))
    found = loss_scores(selector, samples)
    model, tokenizer = load_language_model(selector.folder, on_gpu=False), selector.tokenizer()
    assert np.array_equal(found["-NLL"], -answer_nll(model, tokenizer, samples))
    alone = answer_nll(model, tokenizer, [without_question(sample) for sample in samples])
    assert found["IFD"] == pytest.approx(-found["-NLL"] / alone)
    assert np.median(found["IFD"]) < 1  # the question usually lowers the loss


def test_a_probe_separates_originals_from_copies_that_it_was_trained_on(samples):
    left_out = {"all but one": ("gibberish",)}
    found = probe_scores(Selector(folder=EMBEDDED_SELECTOR), samples, samples, left_out)
    assert set(found) == {"", "all but one"}
    # 128 features, 48 rows: the training rows are separable. A score above 0 is "original".
    assert (found[""] > 0).mean() > 0.9
