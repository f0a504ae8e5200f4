"""What the embedded selector is for: it keeps known-bad rows out of the best part."""

import json

import numpy as np
import pytest

from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Sample, ScoredSample
from selectmoe.scoring.engine import ScoringEngine


@pytest.fixture(scope="module")
def scored():
    """Scores of the demo corpus, and which of its rows are known to be bad."""
    samples = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    outcomes = ScoringEngine.from_pretrained(device="cpu").score(samples)
    scores = np.array([o.score for o in outcomes if isinstance(o, ScoredSample)])
    return scores, np.array([sample.dataset == "demo_corrupted" for sample in samples])


def test_the_best_fifth_holds_at_most_a_third_of_the_bad_rows_of_a_random_fifth(scored):
    scores, is_bad = scored
    num_kept = len(scores) // 5
    best = np.argsort(-scores, kind="stable")[:num_kept]
    assert is_bad[best].sum() <= is_bad.mean() * num_kept / 3


def test_the_demo_corpus_is_about_600_rows_of_every_kind():
    rows = [json.loads(line) for line in DEMO_CORPUS.read_text("utf-8").splitlines()]
    assert 550 <= len(rows) <= 650
    clean = [row for row in rows if row["dataset"] == "demo"]
    assert len(clean) >= 200
    assert len({row["kind"] for row in clean}) >= 10
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_embedded_selector_is_small_and_has_a_card():
    weights = sum(file.stat().st_size for file in EMBEDDED_SELECTOR.glob("*.safetensors"))
    assert 0 < weights <= 8_000_000
    card = (EMBEDDED_SELECTOR / "README.md").read_text("utf-8")
    assert "AUROC" in card
    assert "Limits" in card
