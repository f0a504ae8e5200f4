"""Which rows are kept: exactly k of n, found in a few passes over blocks, in constant memory.

Rows are ordered by score, highest first, then by row key. A row key begins with a hash of the id,
so ties are settled the same way however the corpus was split. Nothing is sorted or gathered but
the rows around the cut: a row's place in the order is read as a number of 16-bit digits, two from
the score and eight from the key, and a histogram of one digit a pass says in which bucket the last
kept row lies, until that bucket is small enough to look at.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# Shape letters: N = rows of a block.

Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Called once a pass; gives (scores float32 (N,), row_keys str (N,)), block by block."""

BITS_PER_DIGIT = 16
NUM_SCORE_DIGITS = 2
HEX_PER_DIGIT = 4
HASH_HEX_LENGTH = 32  # a row key begins with two hashes of 64 bits
NUM_DIGITS = NUM_SCORE_DIGITS + HASH_HEX_LENGTH // HEX_PER_DIGIT
MAX_CANDIDATES = 100_000  # rows looked at one by one: about 15 MB of keys


@dataclass(frozen=True, slots=True)
class Cut:
    """The last row that is kept; a row is kept when it is this one or comes before it."""

    score: float
    row_key: str
    num_kept: int

    def keeps(self, scores: np.ndarray, row_keys: np.ndarray) -> np.ndarray:
        """bool (N,): exactly `num_kept` are True over all the blocks that the cut was found on."""
        threshold = np.float32(self.score)
        kept: np.ndarray = scores > threshold
        tied = np.flatnonzero(scores == threshold)
        kept[tied] = row_keys[tied] <= self.row_key
        return kept


def num_to_keep(num_scored: int, selection_percentage: float) -> int:
    """max(1, floor(share * rows)) of the share as written: 0.29 of 100 is 29, in floats 28."""
    return max(1, int(Fraction(str(selection_percentage)) * num_scored))


def find_cut(blocks: Blocks, *, num_kept: int, max_candidates: int = MAX_CANDIDATES) -> Cut:
    """The cut after the `num_kept` best rows, in two to four passes, a few more among many ties.

    Row keys differ and begin with 32 lower-case hex digits. Raises ValueError for a score that is
    not finite and where there are fewer than `num_kept` rows.
    """
    if num_kept < 1:
        raise ValueError(f"num_kept must be at least 1, got {num_kept}")
    prefix: list[int] = []
    rank = num_kept
    while len(prefix) < NUM_DIGITS:
        histogram = np.zeros(1 << BITS_PER_DIGIT, dtype=np.int64)
        for scores, row_keys in _rows_below(blocks, prefix):
            # add.at, not bincount: a block may be far smaller than the histogram.
            np.add.at(histogram, _digits(scores, row_keys, len(prefix)), 1)
        bucket, rank = _bucket_of(histogram, rank)
        prefix.append(bucket)
        if histogram[bucket] <= max_candidates:
            break
    candidates = list(_rows_below(blocks, prefix))
    scores = np.concatenate([block[0] for block in candidates])
    row_keys = np.concatenate([block[1] for block in candidates])
    last = np.lexsort((row_keys, descending_keys(scores)))[rank - 1]
    return Cut(float(scores[last]), str(row_keys[last]), num_kept)


def descending_keys(scores: np.ndarray) -> np.ndarray:
    """uint32 (N,): smaller for a higher score, equal for equal scores (-0.0 counts as 0.0)."""
    assert scores.dtype == np.float32, scores.dtype  # a wider score would tie only when rounded
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity; reject such rows before")
    bits = (scores + np.float32(0.0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    # A float's bits grow with it; a negative float's grow the other way.
    return np.where(bits & sign, bits, ~(bits | sign))


def _rows_below(blocks: Blocks, prefix: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over the rows whose first digits are `prefix`."""
    for scores, row_keys in blocks():
        for position, digit in enumerate(prefix):
            same = _digits(scores, row_keys, position) == digit
            scores, row_keys = scores[same], row_keys[same]
        if len(scores):
            yield scores, row_keys


def _digits(scores: np.ndarray, row_keys: np.ndarray, position: int) -> np.ndarray:
    """The digit at `position` of each row's place in the order: (N,), below 65,536."""
    if position < NUM_SCORE_DIGITS:
        shift = BITS_PER_DIGIT * (NUM_SCORE_DIGITS - 1 - position)
        return (descending_keys(scores) >> np.uint32(shift)) & np.uint32(0xFFFF)
    first = HEX_PER_DIGIT * (position - NUM_SCORE_DIGITS)
    letters = row_keys.astype(f"U{HASH_HEX_LENGTH}").view(np.uint32)
    letters = letters.reshape(len(row_keys), HASH_HEX_LENGTH)[:, first : first + HEX_PER_DIGIT]
    values = letters.astype(np.int64) - np.where(letters > ord("9"), ord("a") - 10, ord("0"))
    assert ((values >= 0) & (values < 16)).all(), "a row key begins with 32 hex digits"
    return values @ 16 ** np.arange(HEX_PER_DIGIT - 1, -1, -1)


def _bucket_of(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that holds the row of `rank` (from 1), and that row's rank within the bucket."""
    totals = np.cumsum(histogram)
    if rank > totals[-1]:
        raise ValueError(f"cannot keep {rank} of {totals[-1]} rows")
    bucket = int(np.searchsorted(totals, rank))
    return bucket, rank - int(totals[bucket] - histogram[bucket])
