"""Calibrations: what the scores of a corpus say of a selector. They give the length adjustment of
scores, and the quantiles that turn a score into a percentile.

A calibration belongs to one set of weights, one formula and one choice of turns, and is saved
beside those weights as `calibration.json`. For others there is neither, never a wrong one.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from selectmoe.config.engine import EngineConfig, Turns
from selectmoe.data.writers import write_json
from selectmoe.errors import DataError, ModelError
from selectmoe.model.checkpoint import hash_weights, read_json_object
from selectmoe.model.selector_files import SelectorFiles
from selectmoe.scoring import length_adjustment
from selectmoe.scoring.length_adjustment import (
    LengthAdjustment,
    fit_length_adjustment,
    sigmoid,
)

# Shape letters: N = scores, Q = quantiles.

CALIBRATION_NAME = "calibration.json"
NUM_QUANTILES = 1_001  # 0, 0.1, …, 100 %
DECIMALS = 3  # of a percentile; further ones would be noise
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

_QUANTILES = ("quantiles", "raw_quantiles")
_ADDED_LATER = {"length", "raw_quantiles", "turns"}  # keys that older files lack
_REMEDY = "'selectmoe calibrate --model MODEL --data FILES' makes one"
_OLD_CALIBRATION = f"{CALIBRATION_NAME} is of an earlier version; {_REMEDY}"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # == on arrays gives no single answer
class Calibration:
    """The scores of one corpus by one set of weights, one formula and one choice of turns.

    Raises DataError where a value breaks a rule.
    """

    quantiles: np.ndarray
    """float64 (Q,), ascending: quantile j is the lowest score with at least j / 1,000 of the
    samples at or below it, so each one is a score of the corpus; minimum and maximum included."""
    length: LengthAdjustment | None = None
    """Adjustment of the scores that have these quantiles; None where they are raw."""
    raw_quantiles: np.ndarray | None = None
    """float64 (Q,): the same of raw scores; None where `quantiles` are those."""
    turns: Turns = "all"
    """Assistant turns that were scored."""
    num_samples: int
    """Number of scores."""
    formula: str
    """Name of the scores' formula in SCORE_FORMULAS."""
    max_sequence_length: int
    """Maximum tokens per sample; longer samples were truncated."""
    weights_hash: str
    """SHA-256 of the weights, as in manifests (`hash_weights`)."""
    corpus: Mapping[str, int]
    """Dataset -> number of its samples."""

    def __post_init__(self) -> None:
        _check_quantiles("quantiles", self.quantiles)
        has_both = (self.length is None) == (self.raw_quantiles is None)
        _require(has_both, "raw_quantiles", "given with length, and only with it", self.length)
        if self.raw_quantiles is not None:
            _check_quantiles("raw_quantiles", self.raw_quantiles)
        _require(self.turns in get_args(Turns), "turns", "all or last", self.turns)
        for key in ("num_samples", "max_sequence_length"):
            value = getattr(self, key)
            _require(_is_count(value) and value >= 1, key, "an integer, at least 1", value)
        for key in ("formula", "weights_hash"):
            value = getattr(self, key)
            _require(isinstance(value, str) and value != "", key, "text", value)
        corpus = self.corpus
        counted = isinstance(corpus, Mapping) and all(map(_is_count, corpus.values()))
        _require(
            counted and sum(corpus.values()) == self.num_samples,
            "corpus",
            f"counts by dataset with the sum num_samples ({self.num_samples})",
            corpus,
        )

    def raw(self) -> "Calibration":
        """The calibration of raw scores."""
        if self.raw_quantiles is None:
            return self
        return replace(self, quantiles=self.raw_quantiles, raw_quantiles=None, length=None)

    def percentile(self, score: float) -> float:
        """Percentage of the calibration's samples that score below `score`, plus half of those that
        score the same, in [0, 100]; accurate to 0.1."""
        return float(self.percentiles([score])[0])

    def percentiles(self, scores: ArrayLike) -> np.ndarray:
        """The same for many: float64 (N,). Raises DataError for a score that is not finite."""
        scores_N = _as_float32(scores)
        if not np.isfinite(scores_N).all():
            raise DataError("a percentile needs finite scores, got NaN or infinity")
        below_N = np.searchsorted(self.quantiles, scores_N, side="left")
        not_above_N = np.searchsorted(self.quantiles, scores_N, side="right")
        # Interpolated between two quantiles; in the middle of several equal ones (a tie).
        last = NUM_QUANTILES - 1
        lower_N, upper_N = (
            self.quantiles[np.clip(index_N, 0, last)] for index_N in (below_N - 1, below_N)
        )
        gaps_N = np.where(upper_N > lower_N, upper_N - lower_N, 1.0)  # no gap beyond both ends
        between_N = below_N - 1 + (scores_N - lower_N) / gaps_N
        ranks_N = np.where(not_above_N > below_N, (below_N + not_above_N - 1) / 2, between_N)
        shares_N = np.clip(ranks_N, 0, last) / last
        percentiles_N: np.ndarray = (100 * shares_N).round(DECIMALS)
        return percentiles_N


def calibrate(
    margins: ArrayLike,
    num_tokens: ArrayLike,
    *,
    config: EngineConfig,
    max_sequence_length: int,
    weights_hash: str,
    corpus: Mapping[str, int],
) -> Calibration:
    """The calibration of the raw margins of these samples. Raises DataError where there are none,
    or one is not finite.

    margins: (N,), `formulas.sample_margins`. num_tokens: (N,), tokens that each of them averages.
    config: the settings that they were scored by. max_sequence_length: that of `config`, or the
    model's if it is lower. corpus: dataset -> number of its samples among them.
    """
    margins_N = np.asarray(margins, dtype=np.float64)
    adjustment = fit_length_adjustment(margins_N, num_tokens)
    return Calibration(
        quantiles=score_quantiles(sigmoid(adjustment.adjust(margins_N, num_tokens))),
        length=adjustment,
        raw_quantiles=score_quantiles(sigmoid(margins_N)),
        turns=config.turns,
        num_samples=len(margins_N),
        formula=config.formula,
        max_sequence_length=max_sequence_length,
        weights_hash=weights_hash,
        corpus=dict(corpus),
    )


def score_quantiles(scores: np.ndarray) -> np.ndarray:
    """The 1,001 quantiles of a calibration: float64 (Q,)."""
    ordered_N = np.sort(_as_float32(scores))
    # Whole numbers: 0.1 * 4,000 is above 400 in floats, and its ceiling 401.
    ranks_Q = -(-np.arange(NUM_QUANTILES) * len(ordered_N) // (NUM_QUANTILES - 1))
    quantiles_Q: np.ndarray = ordered_N[np.maximum(ranks_Q, 1) - 1]
    return quantiles_Q


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Writes `calibration.json`, whole or not at all; returns its path."""
    file = folder / CALIBRATION_NAME
    write_json(file, as_json(calibration))
    return file


def as_json(calibration: Calibration) -> dict[str, Any]:
    """The whole calibration for a JSON file or response."""
    arrays = {name: getattr(calibration, name) for name in _QUANTILES}
    return describe(calibration) | {
        # The shortest decimals that round to these float32 scores: 9 digits instead of 17.
        name: [float(str(quantile)) for quantile in array.astype(np.float32)]
        for name, array in arrays.items()
        if array is not None
    }


def from_json(content: object) -> Calibration:
    """Reads the result of `as_json`, also of a version without length adjustment or turns.

    Raises DataError, with key, rule and value, if it is wrong.
    """
    if not isinstance(content, dict):
        raise DataError(f"must hold a JSON object, got {type(content).__name__}")
    keys = {field.name for field in fields(Calibration)}
    for wrong in sorted(keys - content.keys() - _ADDED_LATER):
        raise DataError(f"lacks the key {wrong!r}")
    for wrong in sorted(content.keys() - keys):
        raise DataError(f"has the unknown key {wrong!r}")
    values = content | {
        name: _quantiles(name, content[name])
        for name in _QUANTILES
        if content.get(name) is not None
    }
    values["length"] = _length(content["length"]) if content.get("length") is not None else None
    return Calibration(**values)


def load_calibration(folder: Path) -> Calibration | None:
    """What `save_calibration` wrote; None where there is no such file.

    Raises ModelError, with file, key, rule and value, for one that is broken.
    """
    file = folder / CALIBRATION_NAME
    if not file.is_file():
        return None
    content = read_json_object(file)
    try:
        return from_json(content)
    except DataError as error:
        raise ModelError(f"{file}: {error}") from error


def stored_calibration(files: SelectorFiles) -> Calibration | None:
    """The calibration that lies beside the weights of a selector; None where there is none.

    One that was made on another form of the base that the gates accept is given as one of these
    weights. Raises ModelError as `load_calibration` does.
    """
    calibration = load_calibration(files.calibration_folder())
    if calibration is None or calibration.weights_hash not in files.calibrated_hashes():
        return calibration
    return replace(calibration, weights_hash=files.weights_hash())


def carry_over_calibration(model: str, weights: Path, merged: Path) -> bool:
    """Saves the calibration of stage 1's weights for a folder that they were merged into, whose
    scores are the same. False where there is none of this model with these weights."""
    calibration = load_calibration(weights.parent)
    if calibration is None or calibration.weights_hash != hash_weights(model, weights):
        return False
    new_hash = hash_weights(str(merged), None)
    save_calibration(merged, replace(calibration, weights_hash=new_hash))
    return True


def match_calibration(
    calibration: Calibration | None, config: EngineConfig, *, weights_hash: Callable[[], str]
) -> Calibration | None:
    """`calibration` as it applies to scores by these settings and weights; None if it does not.

    One warning names what scores lack then (percentiles, length adjustment), why, and the remedy.
    weights_hash: called only if the settings match, since it reads all the weights.
    """
    mismatch = _mismatch(calibration, config, weights_hash)
    if calibration is not None and mismatch is None:
        if config.length == "adjusted" and calibration.length is None:
            logger.warning("scores are not adjusted for answer length: %s", _OLD_CALIBRATION)
        return calibration.raw() if config.length == "raw" else calibration
    if config.length == "adjusted":
        what = "scores are not adjusted for answer length and have no percentiles"
        logger.warning("%s: %s; %s, or set scoring.length=raw", what, mismatch, _REMEDY)
    elif calibration is not None:
        logger.warning("scores have no percentiles: %s; %s", mismatch, _REMEDY)
    return None


def _mismatch(
    calibration: Calibration | None, config: EngineConfig, weights_hash: Callable[[], str]
) -> str | None:
    """Why a calibration does not apply; None if it does."""
    if calibration is None:
        return f"there is no {CALIBRATION_NAME} beside the weights"
    if calibration.formula != config.formula:
        made_for = f"the formula {calibration.formula}, and scores are by {config.formula}"
    elif calibration.turns != config.turns:
        made_for = f"scoring.turns={calibration.turns}, and scores are of turns={config.turns}"
    elif (ours := weights_hash()) != calibration.weights_hash:
        made_for = f"weights with the SHA-256 {calibration.weights_hash[:12]}…, not {ours[:12]}…"
    else:
        return None
    return f"{CALIBRATION_NAME} was made for {made_for}"


def describe(calibration: Calibration) -> dict[str, Any]:
    """All but the quantiles, for manifests."""
    names = (field.name for field in fields(calibration) if field.name not in _QUANTILES)
    content = {name: getattr(calibration, name) for name in names}
    length = calibration.length and length_adjustment.as_json(calibration.length)
    return content | {"corpus": dict(calibration.corpus), "length": length}


def _as_float32(scores: ArrayLike) -> np.ndarray:
    """float64 (N,) of float32 values: scores are float32, and a decimal from a file is rounded to
    the score that it was written for."""
    rounded: np.ndarray = np.asarray(scores, dtype=np.float32).astype(np.float64)
    return rounded


def _quantiles(name: str, values: object) -> np.ndarray:
    _require(isinstance(values, list), name, "a list of numbers", values)
    assert isinstance(values, list)
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_finite = is_number and abs(value) <= LARGEST_FLOAT32  # NaN is not
        _require(is_finite, name, "finite numbers", value)
    return _as_float32(values)


def _check_quantiles(name: str, quantiles: np.ndarray) -> None:
    _require(quantiles.shape == (NUM_QUANTILES,), name, "1,001 numbers", quantiles.shape)
    wrong = quantiles[~np.isfinite(quantiles)].tolist()
    _require(not wrong, name, "finite numbers", wrong[:1])
    falls = np.flatnonzero(np.diff(quantiles) < 0).tolist()
    pairs = [quantiles[index : index + 2].tolist() for index in falls[:1]]
    _require(not pairs, name, "ascending", pairs)


def _length(content: object) -> LengthAdjustment:
    try:
        return length_adjustment.from_json(content)
    except DataError as error:
        raise DataError(f"'length': {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise DataError(f"{key!r} must be {rule}, got {value!r}")
