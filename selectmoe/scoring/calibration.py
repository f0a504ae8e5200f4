"""Calibrations: the quantiles of a corpus's scores, which turn a score into a percentile.

A calibration belongs to one set of weights and one formula, and is saved beside those weights as
`calibration.json`. With other weights or another formula there is no percentile, never a wrong one.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from selectmoe.data.writers import write_json
from selectmoe.errors import DataError, ModelError
from selectmoe.model.checkpoint import hash_weights, read_json_object

# Shape letters: N = scores, Q = quantiles.

CALIBRATION_NAME = "calibration.json"
NUM_QUANTILES = 1_001  # 0, 0.1, …, 100 %
DECIMALS = 3  # of a percentile; further ones would be noise
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # == on arrays gives no single answer
class Calibration:
    """The scores of one corpus by one set of weights and one formula.

    Raises DataError where a value breaks a rule.
    """

    quantiles: np.ndarray
    """float64 (Q,), ascending: quantile j is the lowest score with at least j / 1,000 of the
    samples at or below it, so each one is a score of the corpus; minimum and maximum included."""
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
        quantiles = self.quantiles
        _require(quantiles.shape == (NUM_QUANTILES,), "quantiles", "1,001 numbers", quantiles.shape)
        wrong = quantiles[~np.isfinite(quantiles)].tolist()
        _require(not wrong, "quantiles", "finite numbers", wrong[:1])
        falls = np.flatnonzero(np.diff(quantiles) < 0).tolist()
        pairs = [quantiles[index : index + 2].tolist() for index in falls[:1]]
        _require(not pairs, "quantiles", "ascending", pairs)
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
    scores: ArrayLike,
    *,
    formula: str,
    max_sequence_length: int,
    weights_hash: str,
    corpus: Mapping[str, int],
) -> Calibration:
    """The calibration of these scores. Raises DataError where there are none, or one is not finite.

    corpus: dataset -> number of its samples among the scores.
    """
    ordered_N = np.sort(_as_float32(scores))
    num_samples = len(ordered_N)
    if not num_samples or not np.isfinite(ordered_N).all():
        what = "NaN or infinity" if num_samples else "none"
        raise DataError(f"a calibration needs finite scores, got {what}")
    # Whole numbers: 0.1 * 4,000 is above 400 in floats, and its ceiling 401.
    ranks_Q = -(-np.arange(NUM_QUANTILES) * num_samples // (NUM_QUANTILES - 1))
    return Calibration(
        quantiles=ordered_N[np.maximum(ranks_Q, 1) - 1],
        num_samples=num_samples,
        formula=formula,
        max_sequence_length=max_sequence_length,
        weights_hash=weights_hash,
        corpus=dict(corpus),
    )


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Writes `calibration.json`, whole or not at all; returns its path."""
    file = folder / CALIBRATION_NAME
    write_json(file, as_json(calibration))
    return file


def as_json(calibration: Calibration) -> dict[str, Any]:
    """The whole calibration for a JSON file or response."""
    return describe(calibration) | {
        # The shortest decimals that round to these float32 scores: 9 digits instead of 17.
        "quantiles": [float(str(quantile)) for quantile in calibration.quantiles.astype(np.float32)]
    }


def from_json(content: object) -> Calibration:
    """Reads the result of `as_json`. Raises DataError, with key, rule and value, if it is wrong."""
    if not isinstance(content, dict):
        raise DataError(f"must hold a JSON object, got {type(content).__name__}")
    keys = {field.name for field in fields(Calibration)}
    if wrong := sorted(keys ^ content.keys()):
        what = "lacks the key" if wrong[0] in keys else "has the unknown key"
        raise DataError(f"{what} {wrong[0]!r}")
    return Calibration(**content | {"quantiles": _quantiles(content["quantiles"])})


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
    calibration: Calibration | None, *, formula: str, weights_hash: Callable[[], str]
) -> Calibration | None:
    """`calibration` if it was made for this formula and these weights; else None, with a warning.

    weights_hash: called only if the formula matches, since it reads all the weights.
    """
    if calibration is None:
        return None
    if calibration.formula != formula:
        reason = f"the formula {calibration.formula}, and scores are by {formula}"
    elif (ours := weights_hash()) != calibration.weights_hash:
        reason = f"weights with the SHA-256 {calibration.weights_hash[:12]}…, not {ours[:12]}…"
    else:
        return calibration
    logger.warning("no percentiles: %s was made for %s", CALIBRATION_NAME, reason)
    return None


def describe(calibration: Calibration) -> dict[str, Any]:
    """All but the quantiles, for manifests."""
    names = (field.name for field in fields(calibration) if field.name != "quantiles")
    content = {name: getattr(calibration, name) for name in names}
    return content | {"corpus": dict(calibration.corpus)}


def _as_float32(scores: ArrayLike) -> np.ndarray:
    """float64 (N,) of float32 values: scores are float32, and a decimal from a file is rounded to
    the score that it was written for."""
    rounded: np.ndarray = np.asarray(scores, dtype=np.float32).astype(np.float64)
    return rounded


def _quantiles(values: object) -> np.ndarray:
    _require(isinstance(values, list), "quantiles", "a list of numbers", values)
    assert isinstance(values, list)
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_finite = is_number and abs(value) <= LARGEST_FLOAT32  # NaN is not
        _require(is_finite, "quantiles", "finite numbers", value)
    return _as_float32(values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise DataError(f"{key!r} must be {rule}, got {value!r}")
