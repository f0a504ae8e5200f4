"""Exact top-k selection: a radix select over blocks of scores, in a few passes and constant memory.

Rows are ordered by score, highest first, then by row key. A row key begins with a hash of the id,
so ties are broken the same way however the corpus was split. Only the rows around the threshold are
gathered and sorted: the sort key of a row is read as a number of 16-bit digits, two from the score
and eight from the row key, and a histogram of one digit per pass tells which bucket holds the last
kept row, until that bucket is small. Histograms of parts of the rows add up to that of all, so the
parts of a pass may be computed anywhere and in any order; row keys are read only to break ties.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Shape letters: N = rows of a block, M = some of them, V = different values of a digit.

ReadKeys = Callable[[np.ndarray], np.ndarray]
"""Row numbers in a block, int64 (M,) -> their row keys, str (M,)."""
Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Scores float32 (M,), row_keys str (M,) and weights int64 (M,) of the rows in a bucket."""
Rows = np.ndarray | slice
"""Some of a block's N rows, int64 (M,) ascending; all of them as a slice, which copies nothing."""

BITS_PER_DIGIT = 16
NUM_SCORE_DIGITS = 2
HEX_PER_DIGIT = 4
HASH_HEX_LENGTH = 32  # a row key begins with two hashes of 64 bits
NUM_DIGITS = NUM_SCORE_DIGITS + HASH_HEX_LENGTH // HEX_PER_DIGIT
MAX_CANDIDATES = 100_000  # rows looked at one by one: about 15 MB of keys
MAX_PENDING_VALUES = 1 << 19  # of histograms that are added up at once: 8 MB


@dataclass(frozen=True, slots=True)
class Threshold:
    """The last row that is kept; a row is kept when it is this one or comes before it."""

    score: float
    row_key: str
    num_kept: int

    def keeps(self, scores: np.ndarray, read_keys: ReadKeys) -> np.ndarray:
        """bool (N,): exactly `num_kept` are True over all blocks that it was computed from.

        Only the row keys of ties are read.
        """
        threshold = np.float32(self.score)
        kept: np.ndarray = scores > threshold
        tied = np.flatnonzero(scores == threshold)
        if len(tied):
            kept[tied] = read_keys(tied) <= self.row_key
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Number of rows, or the sum of their weights, per value, of the values that occur."""

    values: np.ndarray  # int64 (V,), ascending
    counts: np.ndarray  # int64 (V,)

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Histogram":
        """The histogram of values below 2**32; fastest where they lie close together.

        weights: whole numbers by row; None counts rows.
        """
        lowest = int(values.min()) if len(values) else 0
        if len(values) and int(values.max()) - lowest > 4 * len(values):
            found, inverse = np.unique(values, return_inverse=True)
            return cls(found.astype(np.int64), _sums(inverse, weights))
        counts = _sums(values.astype(np.int64) - lowest, weights)
        found = np.flatnonzero(counts)
        return cls(found + lowest, counts[found])

    @classmethod
    def total(cls, histograms: Iterable["Histogram"]) -> "Histogram":
        """The sum of histograms; they are merged before they fill memory."""
        pending, num_pending = [cls.of(np.empty(0, dtype=np.int64))], 0
        for histogram in histograms:
            pending.append(histogram)
            num_pending += len(histogram.values)
            if num_pending > MAX_PENDING_VALUES:
                pending, num_pending = [cls._merged(pending)], 0
        return cls._merged(pending)

    @classmethod
    def _merged(cls, parts: list["Histogram"]) -> "Histogram":
        values, indices = np.unique(
            np.concatenate([part.values for part in parts]), return_inverse=True
        )
        counts = np.zeros(len(values), dtype=np.int64)
        np.add.at(counts, indices, np.concatenate([part.counts for part in parts]))
        return cls(values, counts)


@dataclass(frozen=True, slots=True)
class ScoreBucket:
    """The rows whose sort keys begin with `digits`; the last kept row is one of them."""

    num_kept: int
    digits: tuple[int, ...]
    rank: int  # of the last kept row within the bucket, from 1
    num_rows: int | None  # None before they are counted
    # With weights, such as answer tokens, `rank` and the two numbers count these instead of rows.

    @classmethod
    def of_all_rows(cls, num_kept: int) -> "ScoreBucket":
        if num_kept < 1:
            raise ValueError(f"num_kept must be at least 1, got {num_kept}")
        return cls(num_kept, (), num_kept, None)

    @property
    def key_range(self) -> tuple[int, int]:
        """The range of `descending_keys` of the scores in the bucket, both ends included."""
        first = self._score_prefix << self._unknown_bits
        return first, first + (1 << self._unknown_bits) - 1

    def is_wide(self, max_candidates: int) -> bool:
        """True where it holds more rows than `max_candidates` and has another digit to split by."""
        too_many = self.num_rows is None or self.num_rows > max_candidates
        return too_many and len(self.digits) < NUM_DIGITS

    def narrowed(self, histogram: Histogram) -> "ScoreBucket":
        """The sub-bucket that holds the last kept row, by the histogram of the next digit."""
        totals = np.cumsum(histogram.counts)
        num_rows = int(totals[-1]) if len(totals) else 0
        if self.rank > num_rows:
            raise ValueError(f"cannot keep {self.rank} of {num_rows} rows")
        index = int(np.searchsorted(totals, self.rank))
        num_before = int(totals[index] - histogram.counts[index])
        return ScoreBucket(
            self.num_kept,
            (*self.digits, int(histogram.values[index])),
            self.rank - num_before,
            int(histogram.counts[index]),
        )

    def next_digits(self, scores: np.ndarray, read_keys: ReadKeys) -> tuple[np.ndarray, Rows]:
        """(M,), below 65,536: the next digit of the rows of a block that lie in the bucket, and
        which rows these are."""
        position = len(self.digits)
        if position >= NUM_SCORE_DIGITS:
            held, row_keys = self._held(scores, read_keys)
            return _key_digits(row_keys, position), held
        if position == 0:
            return first_digits(scores), slice(None)
        keys = descending_keys(scores)
        inside = np.flatnonzero(keys >> BITS_PER_DIGIT == self._score_prefix)
        return keys[inside] & np.uint32(0xFFFF), inside

    def candidates(
        self, scores: np.ndarray, read_keys: ReadKeys, weights: np.ndarray | None = None
    ) -> Candidates:
        """The rows of a block that lie in the bucket; each weighs 1 without `weights`, (N,)."""
        held, row_keys = self._held(scores, read_keys)
        ones = np.ones(len(held), dtype=np.int64)
        return scores[held], row_keys, ones if weights is None else weights[held]

    def _held(self, scores: np.ndarray, read_keys: ReadKeys) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the rows of a block that lie in the bucket, and their row keys."""
        # As int64: NumPy leaves a shift of 32-bit numbers by 32 undefined.
        keys = descending_keys(scores).astype(np.int64)
        held = np.flatnonzero(keys >> self._unknown_bits == self._score_prefix)
        row_keys = read_keys(held)
        for position in range(NUM_SCORE_DIGITS, len(self.digits)):
            same = _key_digits(row_keys, position) == self.digits[position]
            held, row_keys = held[same], row_keys[same]
        return held, row_keys

    def threshold(self, candidates: Iterable[Candidates]) -> Threshold:
        """The last kept row, from all rows in the bucket: that in which their weights, added up in
        their order, reach the rank."""
        scores, row_keys, weights = (
            np.concatenate(parts) for parts in zip(*candidates, strict=True)
        )
        order = np.lexsort((row_keys, descending_keys(scores)))
        last = order[np.searchsorted(np.cumsum(weights[order]), self.rank)]
        return Threshold(float(scores[last]), str(row_keys[last]), self.num_kept)

    @property
    def _score_prefix(self) -> int:
        prefix = 0
        for digit in self.digits[:NUM_SCORE_DIGITS]:
            prefix = prefix << BITS_PER_DIGIT | digit
        return prefix

    @property
    def _unknown_bits(self) -> int:
        """How many of the score's 32 bits the digits do not fix."""
        return BITS_PER_DIGIT * max(NUM_SCORE_DIGITS - len(self.digits), 0)


Scope = str | None
"""Of a threshold: a dataset, which may have any name, or None for the whole corpus."""
WHOLE_CORPUS: Scope = None
ScoreBuckets = Mapping[Scope, ScoreBucket]
"""One per dataset, or a single one of the whole corpus."""


def num_to_keep(num_scored: int, selection_percentage: float) -> int:
    """max(1, floor(fraction * rows)), of the fraction as written: 0.29 of 100 is 29, not 28."""
    return max(1, int(Fraction(str(selection_percentage)) * num_scored))


def narrow(
    buckets: ScoreBuckets,
    count: Callable[[ScoreBuckets], Mapping[Scope, Histogram]],
    *,
    max_candidates: int = MAX_CANDIDATES,
) -> dict[Scope, ScoreBucket]:
    """Buckets that together hold few rows, by one pass per digit for all of them.

    count: a pass; gives the histogram of the next digit of the rows in each bucket.
    """
    narrowed = dict(buckets)
    limit = max_candidates // max(len(buckets), 1)
    while wide := {name: bucket for name, bucket in narrowed.items() if bucket.is_wide(limit)}:
        histograms = count(wide)
        narrowed |= {name: bucket.narrowed(histograms[name]) for name, bucket in wide.items()}
    return narrowed


def first_digits(scores: np.ndarray) -> np.ndarray:
    """(N,), below 65,536: the first digit of each row's place."""
    return descending_keys(scores) >> BITS_PER_DIGIT


def descending_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 (N,): smaller for a higher score, equal for equal scores (-0.0 counts as 0.0)."""
    assert scores.dtype == np.float32, scores.dtype  # a wider score would tie only when rounded
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity; reject such rows before")
    bits = (scores + np.float32(0.0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    # A float's bits grow with it; a negative float's grow the other way.
    return np.where(bits & sign, bits, ~(bits | sign))


def _sums(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """int64, (highest value + 1,): rows per value, or the sums of their weights."""
    # Sums of weights are float64, which is exact up to 9e15 tokens.
    return np.bincount(values, weights=weights).astype(np.int64, copy=False)


def _key_digits(row_keys: np.ndarray, position: int) -> np.ndarray:
    """The digit at `position` of each row's place, below 65,536; the first two are the score's."""
    first = HEX_PER_DIGIT * (position - NUM_SCORE_DIGITS)
    letters = row_keys.astype(f"U{HASH_HEX_LENGTH}").view(np.uint32)
    letters = letters.reshape(len(row_keys), HASH_HEX_LENGTH)[:, first : first + HEX_PER_DIGIT]
    values = letters.astype(np.int64) - np.where(letters > ord("9"), ord("a") - 10, ord("0"))
    assert ((values >= 0) & (values < 16)).all(), "a row key begins with 32 hex digits"
    return values @ 16 ** np.arange(HEX_PER_DIGIT - 1, -1, -1)
