"""On real corpora, a reply without content does not outrank an answer, and the best few percent are
of no one length or source."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from recipes.held_out_rows import is_test_row, read_samples
from selectmoe.data.readers import read_corpora
from selectmoe.records import Message, Sample, ScoredSample, UnscoredSample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.selection.differences import LONG, SHORT
from selectmoe.selection.top_k import num_to_keep

REPLIES = ("!", "!!", "yes", ".", "%", "2", ")", "N/A")
SOURCES = ("cot", "dolly", "flan_v2", "oasst1")
NUM_QUESTIONS = 30  # per source
ROWS_PER_SOURCE = 300


@pytest.fixture(scope="module")
def engine() -> ScoringEngine:
    return ScoringEngine.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def answered(shared_data: Path) -> list[Sample]:
    """Questions of dolly and oasst1 with an answer of some words, which no recipe trained on."""
    rows = []
    for source in ("dolly", "oasst1"):
        found = [
            row
            for row in read_samples([str(shared_data / "instructions" / f"{source}.jsonl")])
            if is_test_row(row.sample_id)
            and [message.role for message in row.messages] == ["user", "assistant"]
            and len(row.messages[-1].content.split()) >= 8
        ]
        rows += Random(0).sample(found, NUM_QUESTIONS)
    return rows


def has_score(outcome: ScoredSample | UnscoredSample) -> bool:
    """False for a row whose prompt fills the maximum length."""
    return isinstance(outcome, ScoredSample)


def scores(engine: ScoringEngine, samples: list[Sample]) -> np.ndarray:
    return np.array([scored.score for scored in engine.score(samples)])


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_without_content_does_not_outrank_the_answer(engine, answered, reply):
    replies = [
        replace(row, messages=(row.messages[0], Message("assistant", reply))) for row in answered
    ]
    real, empty = scores(engine, answered), scores(engine, replies)
    assert (engine.calibration.percentiles(empty) >= 60).mean() <= 1 / 20
    assert (empty > real).mean() <= 1 / 10


def test_the_best_5_percent_of_mixed_sources_are_of_no_one_length_or_source(engine, shared_data):
    pool: list[Sample] = []
    for source in SOURCES:
        rows = read_corpora([str(shared_data / "instructions" / f"{source}.jsonl")])
        found = [row for row in rows if isinstance(row, Sample)]
        pool += Random(0).sample(found, ROWS_PER_SOURCE)
    scored = [(r, o) for r, o in zip(pool, engine.score(pool), strict=True) if has_score(o)]
    pool, outcomes = [row for row, _ in scored], [outcome for _, outcome in scored]
    order = np.argsort([-outcome.score for outcome in outcomes])
    best = order[: num_to_keep(len(pool), 0.05)]
    lengths = np.array([outcome.num_answer_tokens for outcome in outcomes])
    assert SHORT <= np.median(lengths[best]) / np.median(lengths) <= LONG
    for source in SOURCES:
        share = np.mean([pool[index].dataset == source for index in best])
        # A third of its share of the pool, less one standard deviation of 100 draws.
        assert share > 1 / 12 - 0.03, source
