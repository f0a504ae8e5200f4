"""How often a signal ranks the better of two rows above the worse one: pure functions on arrays.

Of rows that are rated alone, every good row is compared with every bad one, which gives the AUROC;
of pairs, the better row with the worse one of its pair. Ties count half.

Shape letters: N = rows, P = comparisons, R = the data as they are and resampled, U = prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 1_000
LIKE_LENGTH = 0.8  # shorter over longer answer of two rows that count as of like length
MAX_COMPARISONS = 4_000_000  # in memory at a time


@dataclass(frozen=True, slots=True)
class Agreement:
    """A fraction in [0, 1], 0.5 by chance, and its 95 % interval: the bootstrap over prompts."""

    estimate: float
    low: float
    high: float
    num_compared: int  # pairs of rows


@dataclass(frozen=True, slots=True, eq=False)  # == on arrays gives no single answer
class Comparisons:
    """Which rows are compared, and the weights of the resampled data."""

    good_N: np.ndarray  # bool (N,); the better row of a pair
    pairs_P2: np.ndarray | None  # int64 (P, 2), better and worse row; None: all with all
    lengths_N: np.ndarray  # answer tokens
    weights_RN: np.ndarray  # float64 (R, N): how often each row is in the data; the first is 1

    @classmethod
    def of(
        cls,
        good: Sequence[bool],
        pairs: Sequence[tuple[int, int]],
        lengths_N: np.ndarray,
        prompts: Sequence[str],
        *,
        seed: int,
    ) -> "Comparisons":
        """Rows of one prompt are drawn together."""
        _, groups_N = np.unique(np.array(prompts, dtype=np.str_), return_inverse=True)
        return cls(
            good_N=np.array(good, dtype=bool),
            pairs_P2=np.array(pairs, dtype=np.int64) if pairs else None,
            lengths_N=lengths_N,
            weights_RN=resample(groups_N, seed=seed),
        )

    def agreement(self, values_N: np.ndarray, *, like_length: bool = False) -> Agreement | None:
        """None where no two rows of like length are compared."""
        shares_R, num_compared = self.shares(values_N, like_length=like_length)
        if not num_compared:
            return None
        low, high = np.nanpercentile(shares_R[1:], [2.5, 97.5])
        return Agreement(float(shares_R[0]), float(low), float(high), num_compared)

    def shares(self, values_N: np.ndarray, *, like_length: bool) -> tuple[np.ndarray, int]:
        """The fraction of comparisons that are right in each of the R data sets, float64 (R,), and
        the number of comparisons."""
        if self.pairs_P2 is None:
            return self._all_with_all(values_N, like_length=like_length)
        better_P, worse_P = self.pairs_P2.T
        right_P = is_above(values_N[better_P], values_N[worse_P])
        counted_P = np.ones(len(right_P), dtype=bool)
        if like_length:
            counted_P = are_like(self.lengths_N[better_P], self.lengths_N[worse_P])
        weights_RP = self.weights_RN[:, better_P] * counted_P
        return _divided(weights_RP @ right_P, weights_RP.sum(axis=1)), int(counted_P.sum())

    def _all_with_all(self, values_N: np.ndarray, *, like_length: bool) -> tuple[np.ndarray, int]:
        good, bad = np.flatnonzero(self.good_N), np.flatnonzero(~self.good_N)
        right_R, all_R = (np.zeros(len(self.weights_RN)) for _ in range(2))
        num_compared = 0
        weights_RB = self.weights_RN[:, bad]
        size = max(MAX_COMPARISONS // len(bad), 1)
        for start in range(0, len(good), size):
            part = good[start : start + size]
            right_GB = is_above(values_N[part, None], values_N[None, bad])
            counted_GB = np.ones(right_GB.shape)
            if like_length:
                counted_GB = are_like(self.lengths_N[part, None], self.lengths_N[None, bad])
                counted_GB = counted_GB.astype(np.float64)
            weights_RG = self.weights_RN[:, part]
            right_R += np.sum((weights_RG @ (right_GB * counted_GB)) * weights_RB, axis=1)
            all_R += np.sum((weights_RG @ counted_GB) * weights_RB, axis=1)
            num_compared += int(counted_GB.sum())
        return _divided(right_R, all_R), num_compared


def resample(groups_N: np.ndarray, *, seed: int, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """Weights of the data as they are, and of draws of as many groups with replacement."""
    num_groups = int(groups_N.max()) + 1
    random = np.random.default_rng(seed)
    drawn_RU = random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_draws)
    weights_RU = np.concatenate([np.ones((1, num_groups)), drawn_RU])
    weights_RN: np.ndarray = weights_RU[:, groups_N]
    return weights_RN


def is_above(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1, 0, or for a tie 0.5."""
    above: np.ndarray = (better > worse) + 0.5 * (better == worse)
    return above


def are_like(lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
    """True where the shorter is at least 0.8 of the longer."""
    like: np.ndarray = np.minimum(lengths, others) >= LIKE_LENGTH * np.maximum(lengths, others)
    return like


def _divided(part_R: np.ndarray, whole_R: np.ndarray) -> np.ndarray:
    """NaN where nothing is compared."""
    shares_R = np.full(len(whole_R), np.nan)
    np.divide(part_R, whole_R, out=shares_R, where=whole_R > 0)
    return shares_R
