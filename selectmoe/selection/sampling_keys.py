"""Sampling keys: standardized rank over temperature plus Gumbel noise from a hash of the row key.

The k rows with the highest keys are a sample without replacement in which a row is drawn with a
weight of exp(rank / temperature) (Gumbel top-k). Every function is pure, and made of operations
that IEEE 754 rounds in one way only, so that each CPU gives the same keys.
"""

from dataclasses import dataclass

import numpy as np

from selectmoe.selection.top_k import Histogram, descending_keys

# Shape letters: N = rows, V = cells of the rank table.

KEY_BITS = 32  # of a float32 score
FINEST_CELL_BITS = 22  # scores from 0.5 to 1 then have 8,192 cells
COARSEST_CELL_BITS = 16
TABLES_OF_FINEST_CELLS = 16  # of a few MB each, at most
UNIT_VARIANCE = 12**0.5  # uniform ranks in [0, 1] have a variance of 1/12
NUM_LOG_TERMS = 12


@dataclass(frozen=True, slots=True, eq=False)
class RankTable:
    """The distribution of scores: numbers of rows in cells of their sort keys."""

    cells: np.ndarray  # int64 (V,), ascending: the first bits of `descending_keys`
    num_better: np.ndarray  # int64 (V,), rows in the cells before
    num_inside: np.ndarray  # int64 (V,)
    cell_bits: int

    @classmethod
    def of(cls, histogram: Histogram, *, cell_bits: int) -> "RankTable":
        """histogram: of `score_cells`."""
        num_better = np.cumsum(histogram.counts) - histogram.counts
        return cls(histogram.values, num_better, histogram.counts, cell_bits)

    def standardized_ranks(self, scores: np.ndarray) -> np.ndarray:
        """float64 (N,) with mean 0 and variance 1 over the rows of the table: -1.73 for the lowest
        score, 1.73 for the highest; linear within a cell, equal for equal scores."""
        keys = descending_keys(scores).astype(np.int64)
        rest_bits = KEY_BITS - self.cell_bits
        cells = np.minimum(np.searchsorted(self.cells, keys >> rest_bits), len(self.cells) - 1)
        inside = ((keys & ((1 << rest_bits) - 1)) + 0.5) / (1 << rest_bits)
        num_rows = int(self.num_inside.sum())
        shares = (self.num_better[cells] + self.num_inside[cells] * inside) / num_rows
        ranks: np.ndarray = UNIT_VARIANCE * (0.5 - shares)
        return ranks


def cell_bits(num_tables: int) -> int:
    """Bits of a sort key that a cell fixes; fewer where many datasets have a table each, so that
    all of them together stay small."""
    doublings = max(num_tables - 1, 0) // TABLES_OF_FINEST_CELLS
    return max(FINEST_CELL_BITS - doublings.bit_length(), COARSEST_CELL_BITS)


def score_cells(scores: np.ndarray, *, cell_bits: int) -> np.ndarray:
    """int64 (N,): the cell of each score."""
    cells: np.ndarray = descending_keys(scores).astype(np.int64) >> (KEY_BITS - cell_bits)
    return cells


def sampling_keys(ranks: np.ndarray | None, noise: np.ndarray, *, temperature: float) -> np.ndarray:
    """float32 (N,), in the order of ranks / temperature + noise. ranks: None for all equal.

    Both are multiplied by min(temperature, 1), so that a low temperature leaves digits for ranks.
    """
    if ranks is None:
        return noise.astype(np.float32)
    low, high = min(temperature, 1.0), max(temperature, 1.0)
    keys: np.ndarray = (ranks / high + noise * low).astype(np.float32)
    return keys


def gumbel_noise(hashes: np.ndarray, *, seed: int) -> np.ndarray:
    """float64 (N,): standard Gumbel noise of each row.

    hashes: uint64 (N, 2), with which a row key begins.
    """
    mixed = _mix(hashes[:, 0] + _mix(np.full(1, seed, np.uint64)))
    mixed = _mix(mixed ^ hashes[:, 1])
    # 52 bits and a half are exact, and neither 0 nor 1.
    uniform = ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -natural_log(-natural_log(uniform))


def natural_log(values: np.ndarray) -> np.ndarray:
    """float64 (N,), of positive numbers, to a relative error of about 1e-15.

    NumPy's own differs in its last digit between CPUs, and so might the rows that are drawn.
    """
    mantissas, exponents = np.frexp(values)  # values = mantissas * 2**exponents
    low = mantissas < 0.5**0.5
    mantissas, exponents = np.where(low, 2 * mantissas, mantissas), exponents - low
    ratios = (mantissas - 1) / (mantissas + 1)  # log m = 2 atanh((m - 1) / (m + 1))
    squares = ratios * ratios
    series = np.zeros_like(squares)
    for term in range(2 * NUM_LOG_TERMS - 1, 0, -2):
        series = series * squares + 1 / term
    logs: np.ndarray = exponents * 0.6931471805599453 + 2 * ratios * series
    return logs


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of the generator SplitMix64: uint64 whose bits all depend on all."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
