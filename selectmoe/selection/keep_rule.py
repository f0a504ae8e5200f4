"""The rule that a strategy ends in: which rows of a block are kept, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from selectmoe.selection.blocks import (
    ALL_KEYS,
    ScoreBlock,
    rows_by_scope,
    scope_columns,
    score_blocks,
)
from selectmoe.selection.orders import ByScore, Order
from selectmoe.selection.passes import Thresholds, kept_by
from selectmoe.selection.top_k import descending_keys

# Shape letters: N = rows of a block, M = kept rows of a shard.


class Fate(IntEnum):
    """What became of a scored row."""

    KEPT = 0
    BELOW_FLOOR = 1
    OUTRANKED = 2
    OVER_TOKEN_BUDGET = 3
    OVER_DATASET_MAXIMUM = 4


class KeepRule(Protocol):
    """Decides about each row by itself and travels to the workers that write the kept rows.

    A strategy that needs more than an order of the rows, such as clusters of vectors, has a rule
    of its own; what writes rows, fates and the report knows this protocol alone.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the scored shards that `fates` reads."""
        ...

    @property
    def key_range(self) -> tuple[int, int]:
        """Of `descending_keys` of the scores of kept rows: row groups outside are not read."""
        ...

    def fates(self, block: ScoreBlock) -> np.ndarray:
        """uint8 (N,): a Fate for each row of a block."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdRule:
    """Keeps the rows above a floor of scores and up to a threshold in an order."""

    order: Order
    thresholds: Thresholds
    """The last kept rows, of the corpus or by dataset; a dataset without one keeps none."""
    floors: Thresholds = field(default_factory=dict)
    """The last rows by score that are above the floor; empty without a floor."""
    full_datasets: frozenset[str] = frozenset()
    """Datasets that have reached selection.max_per_dataset."""
    dropped: Fate = Fate.OUTRANKED
    """The fate of rows after a threshold."""

    @property
    def columns(self) -> tuple[str, ...]:
        columns = {*self.order.columns, *scope_columns(self.thresholds)}
        return tuple(sorted({"score", *columns, *scope_columns(self.floors)}))

    @property
    def key_range(self) -> tuple[int, int]:
        by_score = isinstance(self.order, ByScore)
        lowest = [
            min(threshold.score for threshold in thresholds.values())
            for thresholds in (self.floors, self.thresholds if by_score else {})
            if thresholds
        ]
        if not lowest:
            return ALL_KEYS
        return 0, int(descending_keys(np.array([max(lowest)], dtype=np.float32))[0])

    def fates(self, block: ScoreBlock) -> np.ndarray:
        priorities = self.order.priorities(block)
        fates = np.full(len(priorities), self.dropped, np.uint8)
        if self.full_datasets:
            for _, rows in rows_by_scope(block, dict.fromkeys(self.full_datasets)):
                fates[rows] = Fate.OVER_DATASET_MAXIMUM
        fates[kept_by(self.thresholds, block, priorities)] = Fate.KEPT
        if self.floors:
            fates[~kept_by(self.floors, block, block.scores)] = Fate.BELOW_FLOOR
        return fates

    def margins(self, block: ScoreBlock) -> np.ndarray:
        """float64 (N,): priority minus that of the threshold; -inf where there is none."""
        priorities = self.order.priorities(block)
        margins = np.full(len(priorities), -np.inf)
        for name, rows in rows_by_scope(block, self.thresholds):
            margins[rows] = priorities[rows] - np.float64(self.thresholds[name].score)
        return margins


@dataclass(frozen=True, slots=True, eq=False)
class KeptRows:
    """The rows of a shard that are kept; M of them."""

    row_numbers: np.ndarray  # int64 (M,), ascending
    scores: np.ndarray  # float32 (M,)
    num_answer_tokens: np.ndarray  # int32 (M,)


def kept_rows(rule: KeepRule, shard: Path) -> KeptRows:
    """Row groups that can hold no kept row are not read."""
    columns = tuple({*rule.columns, "num_answer_tokens"})
    row_numbers, all_scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    answer_tokens = [np.empty(0, np.int32)]
    for block in score_blocks(shard, columns, key_range=rule.key_range):
        kept = rule.fates(block) == Fate.KEPT
        row_numbers.append(block.row_numbers[kept])
        all_scores.append(block.scores[kept])
        answer_tokens.append(block.numbers("num_answer_tokens")[kept])
    return KeptRows(
        row_numbers=np.concatenate(row_numbers),
        scores=np.concatenate(all_scores),
        num_answer_tokens=np.concatenate(answer_tokens),
    )


def fate_names() -> Mapping[int, str]:
    """What each fate is called in files."""
    return {int(fate): fate.name.lower() for fate in Fate}
