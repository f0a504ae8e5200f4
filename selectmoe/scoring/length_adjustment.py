"""Length adjustment: a mean margin is read against those of answers of similar length.

A mean over three tokens varies far more than one over three hundred, and the tokens of short
answers differ from those of long ones: unadjusted, the best few percent of a corpus are mostly
answers of a word or two. With n the number of tokens that a margin averages,

    adjusted = center + spread * (margin - mean(n)) / deviation(n)

where mean and deviation are those of the calibration corpus at that length, and center and spread
those of all its margins, so that an adjusted margin is on the scale of a margin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from selectmoe.errors import DataError

# Shape letters: N = rows, K = knots.

NUM_KNOTS = 32
BANDWIDTH = 0.25  # of log(n): rows within about a quarter of the length
# Kish's effective sample size of a knot; a deviation then has a standard error of 5 %.
EFFECTIVE_ROWS = 200.0
WIDEST = 8.0  # bandwidth at which all lengths have nearly the same weight
SMALLEST_DEVIATION = 1e-3  # of a margin: rows that are all equal have none
DECIMALS = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)  # == on arrays gives no single answer
class LengthAdjustment:
    """Mean and deviation of the margins of a corpus by answer length: linear in log(n) between the
    knots, constant beyond both ends. Raises DataError where a value breaks a rule."""

    num_tokens: np.ndarray
    """float64 (K,), ascending, at least 1: the knots."""
    means: np.ndarray
    """float64 (K,): mean margin at the knots."""
    deviations: np.ndarray
    """float64 (K,), above 0: standard deviation of the margins at the knots."""
    center: float
    """Mean of all margins."""
    spread: float
    """Standard deviation of all margins, above 0."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "means", "deviations"):
            values = getattr(self, name)
            is_list = isinstance(values, np.ndarray) and values.ndim == 1 and len(values) > 0
            _require(is_list, name, "a list of numbers", values)
            wrong = values[~np.isfinite(values)].tolist()
            _require(not wrong, name, "finite numbers", wrong[:1])
            rule = f"as many as num_tokens ({len(self.num_tokens)})"
            _require(len(values) == len(self.num_tokens), name, rule, len(values))
        lengths = self.num_tokens
        ascending = lengths[0] >= 1 and bool((np.diff(lengths) > 0).all())
        _require(ascending, "num_tokens", "ascending, at least 1", lengths.tolist())
        lowest = float(self.deviations.min())
        _require(lowest > 0, "deviations", "above 0", lowest)
        _require(bool(np.isfinite(self.center)), "center", "finite", self.center)
        positive = bool(np.isfinite(self.spread)) and self.spread > 0
        _require(positive, "spread", "finite, above 0", self.spread)

    def adjust(self, margins: ArrayLike, counts: ArrayLike) -> np.ndarray:
        """Adjusted margins: float64 (N,).

        margins: (N,). counts: (N,), number of tokens that each of them averages, at least 1.
        """
        knots_K = np.log(self.num_tokens)
        lengths_N = _log_counts(counts)
        means_N = np.interp(lengths_N, knots_K, self.means)
        deviations_N = np.interp(lengths_N, knots_K, self.deviations)
        z_N = (np.asarray(margins, dtype=np.float64) - means_N) / deviations_N
        adjusted_N: np.ndarray = self.center + self.spread * z_N
        return adjusted_N


def fit_length_adjustment(margins: ArrayLike, counts: ArrayLike) -> LengthAdjustment:
    """Fits the adjustment to the rows of a corpus: kernel regressions on log(n) (Nadaraya 1964,
    Watson 1964) of the margin and its square, whose bandwidth grows where rows are sparse.

    margins, counts: (N,), as for `adjust`. Raises DataError where there are none, or a margin is
    not finite.
    """
    margins_N = np.asarray(margins, dtype=np.float64)
    if not len(margins_N) or not np.isfinite(margins_N).all():
        what = "NaN or infinity" if len(margins_N) else "none"
        raise DataError(f"a calibration needs finite margins, got {what}")
    lengths_N = _log_counts(counts)
    knots_K = np.unique(np.linspace(lengths_N.min(), lengths_N.max(), NUM_KNOTS).round(DECIMALS))
    moments_K2 = np.array([_moments_at(knot, lengths_N, margins_N) for knot in knots_K])
    return LengthAdjustment(
        num_tokens=np.exp(knots_K).round(DECIMALS),
        means=moments_K2[:, 0].round(DECIMALS),
        deviations=moments_K2[:, 1].round(DECIMALS),
        center=round(float(margins_N.mean()), DECIMALS),
        spread=round(max(float(margins_N.std()), SMALLEST_DEVIATION), DECIMALS),
    )


def sigmoid(margins_N: np.ndarray) -> np.ndarray:
    """The score of each margin, as scores are stored: float32 (N,)."""
    # tanh does not overflow.
    scores_N: np.ndarray = (0.5 + 0.5 * np.tanh(0.5 * margins_N)).astype(np.float32)
    return scores_N


def as_json(adjustment: LengthAdjustment) -> dict[str, Any]:
    """For calibration.json."""
    values = {field.name: getattr(adjustment, field.name) for field in fields(adjustment)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def from_json(content: object) -> LengthAdjustment:
    """Reads the result of `as_json`. Raises DataError, with key, rule and value, if it is wrong."""
    names = [field.name for field in fields(LengthAdjustment)]
    if not isinstance(content, Mapping) or content.keys() != set(names):
        raise DataError(f"must be a JSON object with the keys {', '.join(names)}, got {content!r}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        numbers = value if isinstance(value, list) else [value]
        _require(all(map(_is_number, numbers)), name, "numbers", value)
        values[name] = np.array(value, np.float64) if isinstance(value, list) else value
    return LengthAdjustment(**values)


def _log_counts(counts: ArrayLike) -> np.ndarray:
    logs_N: np.ndarray = np.log(np.maximum(np.asarray(counts, dtype=np.float64), 1.0))
    return logs_N


def _moments_at(knot: float, lengths_N: np.ndarray, margins_N: np.ndarray) -> tuple[float, float]:
    """Kernel-weighted mean and standard deviation of the margins of rows around one length."""
    enough = min(EFFECTIVE_ROWS, len(lengths_N) / 2)
    bandwidth = BANDWIDTH
    while True:
        weights_N = np.exp(-0.5 * ((lengths_N - knot) / bandwidth) ** 2)
        if bandwidth >= WIDEST or weights_N.sum() ** 2 >= enough * (weights_N**2).sum():
            break
        bandwidth *= 1.25
    mean = float(np.average(margins_N, weights=weights_N))
    variance = float(np.average((margins_N - mean) ** 2, weights=weights_N))
    return mean, max(variance**0.5, SMALLEST_DEVIATION)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise DataError(f"{key!r} must be {rule}, got {value!r}")
