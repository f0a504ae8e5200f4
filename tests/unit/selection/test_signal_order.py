"""Rows ordered by stored signals: exact, and the same for any partition of the rows."""

import json

import numpy as np
import pytest

from selectmoe.config.rank_by import RankWeight
from selectmoe.config.selection import SelectConfig, SelectionConfig
from selectmoe.errors import ConfigError
from selectmoe.scoring.signal_weights import SignalWeight, save_weights
from selectmoe.scoring.weighted_signals import signal_values
from selectmoe.selection.outputs import select_rows
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.signal_order import LOWEST, Moments, rank_values
from tests.selection_run import finished_run, sample

ONE = RankWeight(1.0, None)


@pytest.fixture
def nll():
    return np.random.default_rng(0).gamma(2.0, size=5_000).astype(np.float32)


def test_moments_are_those_of_numpy_and_the_same_for_any_split(nll):
    whole = Moments.of(nll)
    entry = whole.standardized(RankWeight(2.0, None))
    assert entry.weight == 2.0
    assert entry.mean == pytest.approx(float(nll.mean()), abs=1e-5)
    assert entry.deviation == pytest.approx(float(nll.std()), abs=1e-5)
    random = np.random.default_rng(1)
    for _ in range(5):
        parts = np.split(random.permutation(nll), np.sort(random.integers(0, 5_000, size=7)))
        assert sum(map(Moments.of, parts), Moments()) == whole


def test_rows_without_a_value_count_for_nothing_and_come_last(nll):
    with_nan = np.concatenate([nll, [np.nan]])
    assert Moments.of(with_nan) == Moments.of(nll) + Moments(num_missing=1)
    entry = Moments.of(nll).standardized(ONE)
    values = rank_values({"nll": entry}, {"nll": with_nan})
    assert values.dtype == np.float32
    assert values[-1] == LOWEST
    assert np.isfinite(values).all()
    assert abs(values[:-1].mean()) < 1e-5
    assert values[:-1].std() == pytest.approx(1, abs=1e-5)


def test_a_row_has_one_value_in_any_block(nll):
    scores = np.random.default_rng(2).random(5_000).astype(np.float32)
    weights = {"nll": SignalWeight(-0.3, 1.7, 0.9), "gate": SignalWeight(1.1, 0.2, 0.31)}
    signals = {"nll": nll.astype(float), "gate": signal_values("gate", scores)}
    whole = rank_values(weights, signals)
    parts = [
        rank_values(weights, {name: column[rows] for name, column in signals.items()})
        for rows in np.array_split(np.arange(5_000), 7)
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_values_that_are_all_equal_have_a_deviation_of_1():
    assert Moments.of(np.full(9, 0.5)).standardized(ONE) == SignalWeight(1.0, 0.5, 1.0)
    assert Moments().standardized(ONE) == SignalWeight(1.0, 0.0, 1.0)


def test_a_deviation_that_is_given_is_used(nll):
    assert Moments.of(nll).standardized(RankWeight(0.5, 3.0)).deviation == 3.0


@pytest.fixture(scope="module")
def made():
    """Scores and signals of 90 rows, of which three have no pmi."""
    random = np.random.default_rng(0)
    scores = random.uniform(0.05, 0.95, size=90).astype(np.float32)
    pmi = random.normal(size=90).astype(np.float32)
    pmi[[7, 8, 9]] = np.nan
    return scores, pmi


def run_of(folder, made, *, rows_per_shard):
    scores, pmi = made
    samples = [sample(number, "word " * (number % 13 + 1)) for number in range(90)]
    config = SelectConfig(rows_per_shard=rows_per_shard)
    signals = {"pmi": [None if np.isnan(value) else value for value in pmi.tolist()]}
    return finished_run(folder, samples, scores.tolist(), config=config, signals=signals)


def selected(run, output, rank_by, num_rows=12, **settings):
    config = SelectConfig(
        scored=str(run.root), selection=SelectionConfig(rank_by=rank_by, rows=num_rows, **settings)
    )
    (output).mkdir()
    found = select_rows(run, RunFolder(output), config)
    lines = (output / "selected_data.jsonl").read_text("utf-8").splitlines()
    return {json.loads(line)["id"] for line in lines}, found


def best(values, num_rows=12):
    return {f"row-{number}" for number in np.argsort(-values, kind="stable")[:num_rows]}


def test_the_best_rows_by_one_signal_and_by_weights_are_kept_for_any_shards(made, tmp_path):
    scores, pmi = made
    runs = {size: run_of(tmp_path / f"run-{size}", made, rows_per_shard=size) for size in (7, 90)}
    margins = np.log(scores.astype(float)) - np.log1p(-scores.astype(float))
    known = pmi[np.isfinite(pmi)].astype(float)
    weighted = margins / margins.std() + 0.5 * (np.nan_to_num(pmi, nan=-99.0) / known.std())
    expected = {
        "pmi": best(np.nan_to_num(pmi, nan=-99.0)),
        "-pmi": best(np.nan_to_num(-pmi, nan=-99.0)),
        "{gate: 1, pmi: 0.5}": best(weighted),
    }
    for number, (rank_by, rows) in enumerate(expected.items()):
        results = [
            selected(run, tmp_path / f"{number}-{size}", rank_by) for size, run in runs.items()
        ]
        assert [kept for kept, _ in results] == [rows, rows]
        one, other = (found.thresholds[None] for _, found in results)
        assert one == other
        assert any("3 scored rows lack pmi" in text for text in results[0][1].chosen.shortfalls)


def test_weights_of_a_file_are_those_of_the_run(made, tmp_path):
    run = run_of(tmp_path / "run", made, rows_per_shard=20)
    weights = {"gate": SignalWeight(0.8, 0.1, 1.3), "pmi": SignalWeight(-0.4, 0.0, 0.9)}
    save_weights(tmp_path / "weights.json", weights, {})
    kept, _ = selected(run, tmp_path / "file", str(tmp_path / "weights.json"))
    (tmp_path / "weights.json").unlink()
    text = "{gate: 0.8/1.3, pmi: -0.4/0.9}"
    assert SelectionConfig(rank_by=text).rank_by == text
    again, _ = selected(run, tmp_path / "text", text)
    assert kept == again


def test_a_floor_is_of_scores_and_passes_run_anywhere(made, tmp_path):
    scores, pmi = made
    run = run_of(tmp_path / "run", made, rows_per_shard=20)
    kept, found = selected(run, tmp_path / "floor", "pmi", floor=0.5)
    above = scores >= np.sort(scores)[45]
    assert kept == best(np.where(above, np.nan_to_num(pmi, nan=-99.0), -999.0))
    assert found.chosen.rule.order.unit == "rank_value"


@pytest.mark.parametrize("settings", [{"strategy": "sampled"}, {"strategy": "longest"}])
def test_only_top_ranks_by_signals(settings):
    with pytest.raises(ConfigError, match="rank_by must be gate with strategy="):
        SelectionConfig(rank_by="pmi", **settings)


def test_a_signal_that_is_not_stored_is_refused(made, tmp_path):
    run = run_of(tmp_path / "run", made, rows_per_shard=20)
    with pytest.raises(ConfigError, match=r"needs the signal nll, .* scoring.signals=\[nll\]"):
        selected(run, tmp_path / "out", "nll")
    config = SelectConfig(selection=SelectionConfig(rank_by="{gate: 1, pmi: 1}"))
    with pytest.raises(ConfigError, match="needs the signal pmi"):
        config.require_ranked_signals()


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"weights.json cannot be read: No such file"):
        SelectionConfig(rank_by=str(tmp_path / "weights.json"))
    (tmp_path / "weights.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"must be a weights.json of jobs/fit_weights.py"):
        SelectionConfig(rank_by=str(tmp_path / "weights.json"))
