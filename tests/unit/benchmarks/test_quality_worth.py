"""Downstream value of a selection: the pool, the selection, finetuning of the tiny target."""

import dataclasses
import logging

import numpy as np
import pytest

from benchmarks.quality_worth import (
    NO_FINETUNING,
    RANDOM,
    Pool,
    Run,
    WorthSettings,
    choose,
    compare_with_random,
    corrupted_pool,
    measure_worth,
    plan_runs,
    worth_rows,
)
from selectmoe.corpus.shards import row_key
from selectmoe.data.readers import read_corpus
from selectmoe.errors import DataError
from selectmoe.evaluation.answer_loss import AnswerLoss
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Message, Sample


@pytest.fixture(scope="module")
def clean():
    return [row for row in read_corpus(str(DEMO_CORPUS)) if row.dataset == "demo"]


def test_a_fraction_of_the_pool_is_replaced_by_corrupted_copies(clean):
    pool, corrupted = corrupted_pool(clean[:50], fraction=0.3, seed=1)
    assert corrupted.sum() == 15
    for row, copy, is_copy in zip(clean, pool, corrupted, strict=False):
        assert (copy.sample_id.partition("#")[0], copy.dataset) == (row.sample_id, row.dataset)
        assert (copy == row) != is_copy
    kinds = {row.sample_id.partition("#")[2] for row in pool} - {""}
    assert len(kinds) > 12  # of 15 alternating ones; if one does not apply, the next is used
    again, where = corrupted_pool(clean[:50], fraction=0.3, seed=1)
    assert again == pool
    assert (where == corrupted).all()
    assert (corrupted_pool(clean[:50], fraction=0.3, seed=2)[1] != corrupted).any()


def test_a_row_that_no_corruption_applies_to_stays():
    short = [Sample("d", str(n), (Message("assistant", "Yes"),)) for n in range(4)]
    pool, corrupted = corrupted_pool(
        short, fraction=0.5, seed=0, kinds=["shuffled_words", "run_on"]
    )
    assert pool == short
    assert not corrupted.any()


def test_the_best_rows_are_selected_and_ties_broken_by_the_hash_of_the_id(clean):
    keys = np.array([row_key(row) for row in clean[:10]])
    scores = np.array([0.1, 0.9, 0.3, 0.8, 0.3, 0.3, 0.2, 0.3, 0.0, 0.3])
    assert choose(scores, 0.2, keys).tolist() == [1, 3]
    tied = np.flatnonzero(scores == 0.3)
    expected = {1, 3, *tied[np.argsort(keys[tied])][:2].tolist()}
    assert set(choose(scores, 0.4, keys).tolist()) == expected
    assert len(choose(scores, 0.01, keys)) == 1


def test_random_differs_between_seeds_and_a_scorer_selects_the_same_rows():
    keys = np.array([f"{n:032x}" for n in range(40)])
    scores = {"gate": np.arange(40.0), "length": -np.arange(40.0)}
    settings = WorthSettings(seeds=(0, 1, 2), only={0.20: ("gate",)})
    runs = plan_runs(scores, keys, settings)
    named = [(run.scorer, run.fraction, run.seed) for run in runs]
    by_all = [(name, 0.05, seed) for name in (RANDOM, "gate", "length") for seed in (0, 1, 2)]
    by_few = [(name, 0.20, seed) for name in (RANDOM, "gate") for seed in (0, 1, 2)]
    assert named == [(NO_FINETUNING, 0.0, 0), *by_all, *by_few]
    chosen = {(run.scorer, run.fraction): set() for run in runs}
    for run in runs:
        chosen[run.scorer, run.fraction].add(tuple(run.positions.tolist()))
    assert chosen["gate", 0.05] == {(38, 39)}
    assert chosen["length", 0.05] == {(0, 1)}
    assert len(chosen[RANDOM, 0.20]) == 3
    assert all(len(rows) == 8 for rows in chosen[RANDOM, 0.20])


def test_all_answer_tokens_have_the_same_weight_in_a_difference():
    # Two seeds, three rows of 1, 4 and 5 tokens: 1 nat less on the first, 2 more on the last.
    difference_SR = np.array([[-1.0, 0.0, 1.5], [-1.0, 0.0, 2.5]])
    found = compare_with_random(difference_SR, np.array([1, 4, 5]), np.array(["a", "a", "b"]))
    assert found["difference"] == pytest.approx(0.1)
    assert found["difference_by_dataset"] == pytest.approx({"a": -0.2, "b": 0.4})
    # Of eight combinations of signs four are as far from 0 as 1 is: those where the 2 is alone or
    # has the 1 beside it, so all of them.
    assert found["p_rows"] == 1.0
    # 0.5 and 1.5: mean 1, standard error 0.5, t = 2; one degree of freedom: 1 - 2 / pi * atan(2).
    assert found["p_seeds"] == pytest.approx(1 - 2 / np.pi * np.arctan(2))


def test_a_row_of_the_table_describes_its_training_rows():
    pool = Pool(
        positions=np.arange(3), samples=[], row_keys=np.empty(0),
        num_answer_tokens=np.array([10, 20, 30]), corrupted=np.array([True, False, False]),
    )  # fmt: skip
    runs = [
        Run(NO_FINETUNING, 0.0, 0, np.empty(0, dtype=np.int64)),
        *(Run(RANDOM, 0.5, seed, np.array([seed])) for seed in (0, 1)),
        *(Run("gate", 0.5, seed, np.array([2])) for seed in (0, 1)),
    ]
    nats = [8.0, 6.0, 7.0, 4.0, 5.0]
    losses = [[AnswerLoss(0, nll, 2, 9)] for nll in nats]
    base, random, gate = worth_rows(runs, losses, pool, ["d"])
    assert (base.num_rows, base.num_answer_tokens, base.corrupted_share) == (0, 0, None)
    assert (random.num_answer_tokens, random.corrupted_share) == (15, 0.5)
    assert (gate.num_rows, gate.num_answer_tokens, gate.corrupted_share) == (1, 30, 0.0)
    assert [row.loss for row in (base, random, gate)] == [4.0, 3.25, 2.25]
    assert gate.loss_by_seed == (2.0, 2.5)
    assert (base.difference, random.difference, gate.difference) == (None, None, -1.0)
    assert (base.p_seeds, random.p_seeds, gate.p_seeds) == (None, None, 0.0)


@pytest.mark.timeout(300)  # imports torch, then four finetuning runs of a second or two
def test_finetuning_on_original_answers_is_better_than_on_random_letters(clean, caplog):
    short = [row for row in clean if sum(len(turn.content) for turn in row.messages) < 600]
    held_out, real = short[:8], short[8:32]
    pool, corrupted = corrupted_pool(real, fraction=0.5, seed=0, kinds=["gibberish"])
    question = Message("user", "word " * 400)
    unanswered = dataclasses.replace(real[0], messages=(question, real[0].messages[-1]))
    settings = WorthSettings(
        fractions=(0.5,), seeds=(0,), num_workers=1,
        overrides=("preset=tiny", "training.num_epochs=2", "training.effective_batch_size=4",
                   "training.batch_size=4"),
    )  # fmt: skip
    scores = {"real": np.append(~corrupted, True), "worse": np.append(corrupted, True)}
    with caplog.at_level(logging.INFO, logger="benchmarks.quality_worth"):
        rows = measure_worth(
            [*pool, unanswered], [*held_out, unanswered], scores, settings,
            corrupted=np.append(corrupted, False),
        )  # fmt: skip
    base, random, best, worst = rows
    assert [row.scorer for row in rows] == [NO_FINETUNING, RANDOM, "real", "worse"]
    # The row without an answer in 256 tokens is used neither for training nor for evaluation.
    assert [row.num_rows for row in rows] == [0, 12, 12, 12]
    assert (best.corrupted_share, worst.corrupted_share) == (0.0, 1.0)
    assert best.loss < min(base.loss, random.loss)
    assert max(base.loss, random.loss) < worst.loss
    assert (best.p_seeds, best.difference_by_dataset.keys()) == (None, {"demo"})
    assert "worth 4/4: " in caplog.text


def test_a_pool_without_answers_is_rejected(clean):
    unanswered = dataclasses.replace(clean[0], messages=(Message("user", "word " * 400),))
    with pytest.raises(DataError, match="max_sequence_length=256 must leave rows for training"):
        measure_worth([unanswered], clean[:3], {}, WorthSettings())
