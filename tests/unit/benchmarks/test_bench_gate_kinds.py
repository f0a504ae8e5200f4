"""bench_gate_kinds.py on a few rows of the demo corpus and a small random base."""

import gzip
import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from benchmarks.bench_gate_kinds import (
    QUICK_PLAN,
    compare,
    final_mixes,
    load_base,
    mean_and_deviation,
)
from benchmarks.gate_kinds_fits import ALL, Mix, mixes, weights_of
from benchmarks.gate_kinds_metrics import measure
from benchmarks.gate_kinds_rows import PAIR_FILES, Extent, draw_rows, rated_rows
from benchmarks.gate_kinds_sets import make_sets
from benchmarks.quality_rows import RATED_FILE
from benchmarks.results import ROOT
from selectmoe.data.chat import ChatTokenizer

TINY = Extent(
    num_training_per_family=9,
    num_validation_per_family=3,
    num_test_per_family=3,
    num_short=2,
    num_calibration_per_family=12,
)


@pytest.fixture(scope="module")
def base():
    model, chat = load_base(None, "cpu")
    return model, ChatTokenizer(chat.tokenizer, max_sequence_length=160)


@pytest.fixture(scope="module")
def rows(base):
    return make_sets(draw_rows(None, TINY), base[1])


@pytest.fixture(scope="module")
def measured(base, rows):
    return compare(*base, rows, replace(QUICK_PLAN, iterations=2, final_iterations=2))


def test_the_benchmark_measures_layers_penalties_mixes_and_finals(measured):
    assert set(measured["layers"]) >= {"0-0", "4-4", "0-4", "2-2"}
    penalties = measured["penalties"]["2-2"]
    assert f"{measured['penalty']:g}" in penalties
    assert set(measured["kinds"]) == set(QUICK_PLAN.mixes)
    assert {name.rsplit(" ", 1)[0] for name in measured["finals"]} == set(final_mixes(Mix(ALL)))
    assert measured["greedy"][0]["groups"][0] == "order"
    for metrics in (*measured["layers"].values(), *penalties.values()):
        assert 0 <= metrics["seen"] <= 1
        assert metrics["pairs"] is None  # the demo corpus has no ratings


def test_kinds_whose_likelihood_is_not_computed_have_no_metric(measured):
    for name in ("-NLL", "PMI"):
        halves = measured["baselines"][name]
        assert halves["A"]["seen"] is halves["A"]["unseen"] is halves["B"]["seen"] is None
        assert 0 <= halves["B"]["unseen"] <= 1
        assert set(halves["B"]["seen_by_kind"].values()) == {None}


def test_draws_are_the_same_each_time_and_no_half_shares_an_original(rows):
    again = draw_rows(None, TINY)
    assert [row.sample for row in again] == [row.sample for row in draw_rows(None, TINY)]
    by_part = {}
    for row in again:
        if not row.kind:
            by_part.setdefault(row.part, set()).add(row.sample.sample_id)
    for one, other in (("training", "validation"), ("validation", "test"), ("training", "test")):
        assert not by_part[one] & by_part[other]
    assert not by_part["calibration"] & by_part["training"]
    for originals, copies in rows.halves["A"].seen.by_kind.values():
        assert (rows.originals_N[originals] == rows.originals_N[copies]).all()


def test_a_kind_counts_by_its_weight_and_not_by_the_number_of_its_copies():
    kinds = np.array(["typos", "typos", "typos", "link"])
    weights = weights_of(kinds, Mix(("typos", "link"), {"link": 3.0}))
    assert weights[3] == pytest.approx(3 * weights[:3].sum())


def test_pairs_and_rated_rows_are_read_with_their_halves(tmp_path, base):
    write_ratings(tmp_path)
    rows = make_sets(draw_rated(tmp_path), base[1])
    lengths = rows.num_answer_N.astype(float)
    for name, half in rows.halves.items():
        # The better answer is the longer one, in every pair and every rated row.
        metrics = measure(lengths, half, rows.num_answer_N)
        assert metrics["revisions"] == metrics["arguments"] == metrics["rated"] == 1
        assert len(half.pairs["revisions"].better) == {"A": 2, "B": 1}[name]
        assert len(half.rated.better) == len(half.rated.worse) == 1
        assert measure(np.full(len(lengths), np.nan), half, rows.num_answer_N)["rated"] is None


def test_a_mean_over_seeds_has_the_deviation_of_each_metric():
    by_seed = [{"pairs": 0.5, "rated": None}, {"pairs": 0.7, "rated": None}]
    found = mean_and_deviation(by_seed)
    assert found["mean"]["pairs"] == pytest.approx(0.6)
    assert found["deviation"]["pairs"] == pytest.approx(0.1)
    assert found["mean"]["rated"] is None


def test_the_committed_results_have_the_form_of_the_benchmark(measured):
    path = ROOT / "benchmarks" / "results" / "gate_kinds.json"
    committed = json.loads(path.read_text("utf-8"))
    assert set(measured) <= set(committed)
    assert set(mixes()) == set(committed["kinds"])
    for part in ("layers", "baselines", "finals"):
        ours, theirs = (next(iter(made[part].values())) for made in (measured, committed))
        assert set(ours) == set(theirs)
    ours, theirs = (made["baselines"]["length"]["B"] for made in (measured, committed))
    assert set(ours) == set(theirs)


def draw_rated(folder):
    return list(rated_rows(folder, 10, Random(0)))


def write_ratings(folder):
    """Three revisions, three arguments and four rated rows, of which the longer one is better."""
    (folder / "quality").mkdir()
    (folder / "preferences").mkdir()
    for part in ("revisions", "arguments"):
        rows = [
            rating(f"{part}-{n}", label, pair_id=f"p{n}", split="train" if n < 2 else "test")
            for n in range(3)
            for label in (0, 1)
        ]
        write(folder / PAIR_FILES[part], rows)
    write(folder / RATED_FILE, [rating(f"r{n}", label=n // 2) for n in range(4)])


def rating(row_id, label, **fields):
    answer = "a longer answer of eight words or so" if label else "short"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    return {"id": row_id, "label": label, "messages": turns, **fields}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
