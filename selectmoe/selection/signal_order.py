"""Orders rows by stored signals, one alone or several weighted.

    value = sum of weight / deviation * (signal - mean)

Mean and standard deviation are those of the scored rows, from sums of whole steps, which are exact:
they do not depend on how the rows are split into shards, nor on the order in which these are added
up. Each row's value is computed by itself. So the order is the same for any partition of the rows.

Shape letters: N = rows of a block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import pyarrow.parquet as pq

from selectmoe.config.rank_by import RankWeight, parse_rank_by, require_ranked_signals
from selectmoe.corpus.map_items import MapItems
from selectmoe.scoring.signal_weights import SignalWeight
from selectmoe.scoring.weighted_signals import column_of, signal_values
from selectmoe.selection.blocks import ScoreBlock, score_blocks
from selectmoe.selection.passes import ShardGroup

LOWEST = float(np.finfo(np.float32).min)  # of a row that lacks a signal
# Signals are nats: in steps of 1 / 65,536, squares of what is below 1,024 stay below 2^52.
STEPS, LARGEST = 1 << 16, 1 << 10
SUMMED_TOGETHER = 1_024  # squares whose sum stays within 64 bits


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, sum and sum of squares of values in whole steps; how many rows lack one."""

    num_rows: int = 0
    total: int = 0
    squares: int = 0
    num_missing: int = 0

    @classmethod
    def of(cls, values_N: np.ndarray) -> "Moments":
        found = values_N[np.isfinite(values_N)]
        steps = np.rint(np.clip(found, -LARGEST, LARGEST) * STEPS).astype(np.int64)
        squares = 0
        for start in range(0, len(steps), SUMMED_TOGETHER):
            part = steps[start : start + SUMMED_TOGETHER]
            squares += int(part @ part)
        return cls(len(steps), int(steps.sum()), squares, len(values_N) - len(steps))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.num_rows + other.num_rows,
            self.total + other.total,
            self.squares + other.squares,
            self.num_missing + other.num_missing,
        )

    def standardized(self, given: RankWeight) -> SignalWeight:
        """The weight with mean and deviation; 1 for values that are all equal."""
        if not self.num_rows:
            return SignalWeight(given.weight, 0.0, given.deviation or 1.0)
        mean = Fraction(self.total, self.num_rows)
        variance = Fraction(self.squares, self.num_rows) - mean * mean
        own = math.sqrt(float(variance)) / STEPS or 1.0
        return SignalWeight(given.weight, float(mean / STEPS), given.deviation or own)


@dataclass(frozen=True, slots=True, eq=False)
class BySignals:
    """An Order: the highest weighted sum of signals first; rows that lack one come last."""

    weights: Mapping[str, SignalWeight]
    unit: str = "rank_value"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(sorted({column_of(name) for name in self.weights}))

    def priorities(self, block: ScoreBlock) -> np.ndarray:
        return rank_values(self.weights, _signals_of(block, tuple(self.weights)))


def rank_values(
    weights: Mapping[str, SignalWeight], signals: Mapping[str, np.ndarray]
) -> np.ndarray:
    """float32 (N,). Signals are added up in the order of their names, row by row."""
    total_N = np.zeros(len(next(iter(signals.values()))))
    for name in sorted(weights):
        entry = weights[name]
        total_N += entry.weight * ((signals[name] - entry.mean) / entry.deviation)
    return np.where(np.isfinite(total_N), total_N, LOWEST).astype(np.float32)


def signal_order(
    rank_by: str, groups: Sequence[ShardGroup], map_items: MapItems
) -> tuple[BySignals, list[str]]:
    """The order, and a sentence where rows lack a signal.

    Raises ConfigError for a signal that the scored rows do not have.
    """
    given = parse_rank_by(rank_by)
    for shards in groups[:1]:
        require_ranked_signals(rank_by, tuple(pq.read_schema(shards[0]).names))
    moments = dict.fromkeys(given, Moments())
    for part in map_items(partial(count_moments, tuple(given)), groups):
        moments = {name: moments[name] + part[name] for name in given}
    weights = {name: moments[name].standardized(given[name]) for name in given}
    lacking = [
        f"{found.num_missing:,} scored rows lack {name} and come last by "
        f"selection.rank_by={rank_by}"
        for name, found in moments.items()
        if found.num_missing
    ]
    return BySignals(weights), lacking


def count_moments(signals: tuple[str, ...], shards: ShardGroup) -> dict[str, Moments]:
    """A pass: number, sum and sum of squares of each signal."""
    moments = dict.fromkeys(signals, Moments())
    columns = tuple(sorted({"score", *map(column_of, signals)}))
    for shard in shards:
        for block in score_blocks(shard, columns):
            for name, values_N in _signals_of(block, signals).items():
                moments[name] += Moments.of(values_N)
    return moments


def _signals_of(block: ScoreBlock, signals: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {
        name: signal_values(
            name, block.scores if name == "gate" else block.numbers(column_of(name))
        )
        for name in signals
    }
