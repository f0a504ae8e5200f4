"""Scores become quantiles, a score becomes a percentile, and a broken file is refused."""

import functools
import json
import logging

import numpy as np
import pytest

from selectmoe.config.engine import EngineConfig
from selectmoe.errors import DataError, ModelError
from selectmoe.scoring.calibration import (
    CALIBRATION_NAME,
    NUM_QUANTILES,
    Calibration,
    calibrate,
    describe,
    load_calibration,
    match_calibration,
    save_calibration,
)
from selectmoe.scoring.length_adjustment import sigmoid
from tests.calibrations import raw_calibration

RESOLUTION = 0.1 + 1e-9  # between two quantiles, 0.1 % apart, a percentile is in proportion


def calibration_of(scores) -> Calibration:
    return raw_calibration(scores, corpus={"dolly": len(scores) - 1, "cot": 1})


def adjusted_calibration(num_samples: int = 500, config: EngineConfig | None = None) -> Calibration:
    """Of random margins whose mean rises with the number of tokens."""
    draws = np.random.default_rng(num_samples)
    counts = np.exp(draws.uniform(0, np.log(300), num_samples)).astype(int)
    margins = draws.normal(np.log(counts), 1.0)
    return calibrate(
        margins,
        counts,
        config=config or EngineConfig(),
        max_sequence_length=512,
        weights_hash="abc",
        corpus={"dolly": num_samples},
    )


def exact_percentile(score: float, scores: np.ndarray) -> float:
    """The definition, over all the scores."""
    score, scores = np.float32(score), scores.astype(np.float32)
    return 100 * float((scores < score).mean() + (scores == score).mean() / 2)


def test_quantiles_of_1001_scores_are_these_scores():
    scores = np.random.default_rng(0).permutation(NUM_QUANTILES) / 1_024  # exact in float32
    quantiles = calibration_of(scores).quantiles
    assert quantiles.dtype == np.float64
    # The lowest score with j / 1,000 of 1,001 at or below it is the one of rank ceil(1.001 j).
    ranks = [max(-(-NUM_QUANTILES * j // 1_000), 1) for j in range(NUM_QUANTILES)]
    np.testing.assert_array_equal(quantiles, np.sort(scores)[np.array(ranks) - 1])


def test_quantiles_of_a_few_scores_are_scores_with_minimum_and_maximum():
    quantiles = calibration_of([0.5, 0.25, 0.75]).quantiles
    assert np.unique(quantiles, return_counts=True)[0].tolist() == [0.25, 0.5, 0.75]
    assert np.unique(quantiles, return_counts=True)[1].tolist() == [334, 333, 334]


def test_a_percentile_of_a_few_scores_is_the_share_below_and_half_of_the_ties():
    calibration = calibration_of([0.25, 0.5, 0.5, 0.75])
    found = {score: calibration.percentile(score) for score in (0.25, 0.5, 0.75)}
    assert found == pytest.approx({0.25: 12.5, 0.5: 50.0, 0.75: 87.5}, abs=RESOLUTION)
    assert calibration.percentile(0.3) == pytest.approx(25, abs=RESOLUTION)
    assert calibration.percentile(0.6) == pytest.approx(75, abs=RESOLUTION)


def test_beyond_the_ends_is_0_and_100():
    calibration = calibration_of([0.25, 0.5, 0.75])
    assert calibration.percentiles([0.0, 0.2499, 0.7501, 1.0]).tolist() == [0, 0, 100, 100]


def test_where_all_samples_tie_their_score_is_in_the_middle():
    assert calibration_of([0.5] * 7).percentiles([0.4, 0.5, 0.6]).tolist() == [0, 50, 100]


@pytest.mark.parametrize("num_samples", [1, 2, 50, 999, 1_000, 1_001, 1_500, 4_000])
@pytest.mark.parametrize("decimals", [2, 7])
def test_percentiles_rise_with_the_score_and_keep_to_the_definition(num_samples, decimals):
    """Two decimals make ties of hundreds."""
    draws = np.random.default_rng(num_samples)
    scores = draws.beta(8, 3, num_samples).round(decimals)
    asked = np.sort(np.concatenate([draws.random(500), scores[:500], [0.0, 1.0]]))
    found = calibration_of(scores).percentiles(asked)
    assert (np.diff(found) >= 0).all()
    expected = [exact_percentile(score, scores) for score in asked]
    np.testing.assert_allclose(found, expected, rtol=0, atol=RESOLUTION)


def test_the_top_5_percent_are_told_apart_though_one_score_lies_far_above():
    scores = np.append(0.6 + np.arange(3_999) / 100_000, 0.99)
    calibration = calibration_of(scores)
    asked = np.sort(scores)[-200:-1]
    found = calibration.percentiles(asked)
    assert found[0] == pytest.approx(95, abs=RESOLUTION)
    # Four samples lie between two quantiles, and have percentiles of their own in proportion; in
    # the last 0.1 % the far score leaves no proportion between them.
    assert (np.diff(found[:-3]) > 0).all()
    assert (found[-3:] >= 99.9).all()


def test_a_score_keeps_its_percentile_as_the_decimal_that_a_file_has():
    scores = np.float32([0.1, 0.2, 0.3])
    calibration = calibration_of(scores)
    written = [float(str(score)) for score in scores]
    assert written != scores.tolist()  # neighbours, in float64
    assert calibration.percentiles(written).tolist() == calibration.percentiles(scores).tolist()


@pytest.mark.parametrize("margins", [[], [0.5, float("nan")], [float("inf")]])
def test_margins_that_are_no_numbers_make_no_calibration(margins):
    facts = {"config": EngineConfig(), "max_sequence_length": 64, "weights_hash": "abc"}
    with pytest.raises(DataError, match="a calibration needs finite margins, got"):
        calibrate(margins, [3] * len(margins), corpus={"warm": len(margins)}, **facts)


def test_a_score_that_is_no_number_has_no_percentile():
    with pytest.raises(DataError, match="a percentile needs finite scores"):
        calibration_of([0.5]).percentiles([0.1, float("nan")])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    saved = calibration_of(np.random.default_rng(0).random(5_000))
    file = save_calibration(tmp_path, saved)
    loaded = load_calibration(tmp_path)
    np.testing.assert_array_equal(loaded.quantiles, saved.quantiles)
    assert describe(loaded) == describe(saved)
    assert describe(loaded)["corpus"] == {"dolly": 4_999, "cot": 1}
    assert file.stat().st_size < 20_000
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_NAME]


def test_a_calibration_with_length_adjustment_is_the_same_after_saving(tmp_path):
    saved = adjusted_calibration(config=EngineConfig(turns="last"))
    save_calibration(tmp_path, saved)
    loaded = load_calibration(tmp_path)
    assert describe(loaded) == describe(saved)
    assert loaded.turns == "last"
    asked = [[0.0, 1.0, 5.0], [2, 40, 1_000]]
    np.testing.assert_array_equal(loaded.length.adjust(*asked), saved.length.adjust(*asked))
    np.testing.assert_array_equal(loaded.raw_quantiles, saved.raw_quantiles)


def test_a_file_of_an_earlier_version_is_a_calibration_of_raw_scores(tmp_path):
    file = save_calibration(tmp_path, calibration_of([0.25, 0.5, 0.75]))
    content = json.loads(file.read_text("utf-8"))
    for key in ("length", "raw_quantiles", "turns"):
        content.pop(key, None)
    file.write_text(json.dumps(content), "utf-8")
    loaded = load_calibration(tmp_path)
    assert (loaded.length, loaded.turns) == (None, "all")
    assert loaded.percentile(0.5) == pytest.approx(50, abs=RESOLUTION)


def test_adjusted_scores_of_any_length_have_the_same_percentiles():
    calibration = adjusted_calibration(8_000)
    draws = np.random.default_rng(1)
    for count in (3, 30, 250):
        margins = draws.normal(np.log(count), 1.0, 2_000)
        adjusted = sigmoid(calibration.length.adjust(margins, np.full(2_000, count)))
        top = (calibration.percentiles(adjusted) > 95).mean()
        # 100 of 2,000 expected, with a deviation of 10; the fit at a length adds about as much.
        assert 0.03 < top < 0.07
    raw_top = calibration.raw().percentiles(sigmoid(draws.normal(np.log(3), 1.0, 2_000))) > 95
    assert raw_top.mean() < 0.01


def test_no_file_is_no_calibration(tmp_path):
    assert load_calibration(tmp_path) is None
    assert load_calibration(tmp_path / "nowhere") is None


def with_quantile(position: int, value: object):
    return lambda content: content["quantiles"].__setitem__(position, value)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda content: content.pop("formula"), "lacks the key 'formula'"),
        (lambda content: content.update(rows=[]), "has the unknown key 'rows'"),
        (
            lambda content: content["quantiles"].pop(),
            r"'quantiles' must be 1,001 numbers, got \(1000,\)",
        ),
        (
            lambda content: content.update(quantiles=0.5),
            "'quantiles' must be a list of numbers, got 0.5",
        ),
        (with_quantile(3, float("nan")), "'quantiles' must be finite numbers, got nan"),
        (with_quantile(3, 1e300), r"'quantiles' must be finite numbers, got 1e\+300"),
        (with_quantile(3, "high"), "'quantiles' must be finite numbers, got 'high'"),
        (with_quantile(3, 0.75), r"'quantiles' must be ascending, got \[\[0.75, 0.25\]\]"),
        (lambda content: content.update(turns="first"), "'turns' must be all or last, got 'first'"),
        (
            lambda content: content.update(length=3),
            "'length': must be a JSON object with the keys num_tokens, means, deviations, center",
        ),
        (
            lambda content: content.update(raw_quantiles=content["quantiles"]),
            "'raw_quantiles' must be given with length, and only with it",
        ),
        (lambda content: content.update(num_samples=0), "'num_samples' must be an integer, at"),
        (lambda content: content.update(num_samples=True), "'num_samples' must be an integer"),
        (
            lambda content: content.update(max_sequence_length=1.5),
            "'max_sequence_length' must be an integer, at least 1, got 1.5",
        ),
        (lambda content: content.update(weights_hash=""), "'weights_hash' must be text, got ''"),
        (
            lambda content: content.update(corpus={"dolly": 2}),
            r"'corpus' must be counts by dataset with the sum num_samples \(3\), got {'dolly': 2}",
        ),
        (
            lambda content: content.update(corpus={"dolly": 4, "cot": -1}),
            "'corpus' must be counts by dataset",
        ),
    ],
)
def test_a_broken_file_is_refused_with_file_key_rule_and_value(tmp_path, breaking, message):
    file = save_calibration(tmp_path, calibration_of([0.25, 0.5, 0.75]))
    content = json.loads(file.read_text("utf-8"))
    breaking(content)
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match=f"{CALIBRATION_NAME}: {message}"):
        load_calibration(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / CALIBRATION_NAME).write_text(text, "utf-8")
    with pytest.raises(ModelError, match=f"{CALIBRATION_NAME}: {message}"):
        load_calibration(tmp_path)


def test_it_applies_to_its_own_formula_turns_and_weights_alone(caplog):
    calibration = adjusted_calibration()
    match = functools.partial(match_calibration, weights_hash=lambda: "abc")
    with caplog.at_level(logging.INFO):
        assert match(calibration, EngineConfig()) is calibration
        raw = match(calibration, EngineConfig(length="raw"))
        assert raw.length is None
        np.testing.assert_array_equal(raw.quantiles, calibration.raw_quantiles)
        assert match(None, EngineConfig(length="raw")) is None
        assert caplog.messages == []
        assert match_calibration(calibration, EngineConfig(), weights_hash=lambda: "xyz") is None
        assert match(calibration, EngineConfig(formula="original")) is None
        assert match(calibration, EngineConfig(turns="last", length="raw")) is None
        assert match(None, EngineConfig()) is None
    cure = "'selectmoe calibrate --model MODEL --data FILES' makes one"
    missing = "scores are not adjusted for answer length and have no percentiles"
    assert caplog.messages == [
        f"{missing}: calibration.json was made for weights with the SHA-256 abc…, not xyz…; {cure},"
        " or set scoring.length=raw",
        f"{missing}: calibration.json was made for the formula answer_margin, and scores are by "
        f"original; {cure}, or set scoring.length=raw",
        "scores have no percentiles: calibration.json was made for scoring.turns=all, and scores "
        f"are of turns=last; {cure}",
        f"{missing}: there is no calibration.json beside the weights; {cure}, or set "
        "scoring.length=raw",
    ]


def test_a_calibration_of_an_earlier_version_gives_percentiles_and_says_what_is_missing(caplog):
    old = calibration_of([0.25, 0.75])
    assert match_calibration(old, EngineConfig(), weights_hash=lambda: "abc") is old
    [message] = caplog.messages
    assert message.startswith("scores are not adjusted for answer length: calibration.json is of")
