"""Passes over the scored shards of a run: counts, thresholds, and the rows that these keep.

A pass is a function of a group of shards; what it returns for several groups adds up. MapItems
calls it, on threads or on the workers of a cluster.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from selectmoe.corpus.map_items import MapItems
from selectmoe.selection.blocks import (
    ALL_KEYS,
    ScoreBlock,
    rows_by_scope,
    scope_columns,
    score_blocks,
)
from selectmoe.selection.orders import ByScore, Order
from selectmoe.selection.sampling_keys import score_cells
from selectmoe.selection.top_k import (
    MAX_CANDIDATES,
    MAX_PENDING_VALUES,
    Candidates,
    Histogram,
    ReadKeys,
    Rows,
    Scope,
    ScoreBucket,
    ScoreBuckets,
    Threshold,
    first_digits,
    narrow,
)

NUM_QUANTILE_BINS = 10_000
MAX_SHARDS_PER_GROUP = 64
MIN_GROUPS = 32  # where there are as many shards: for even loads
ShardGroup = Sequence[Path]
Name = TypeVar("Name")


def shard_groups(shards: Sequence[Path]) -> list[ShardGroup]:
    """Consecutive shards, the items that a pass is called on."""
    size = max(1, min(MAX_SHARDS_PER_GROUP, len(shards) // MIN_GROUPS))
    return [shards[start : start + size] for start in range(0, len(shards), size)]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What the first pass counts, by dataset."""

    num_rows: Counter[str]  # that have a score
    num_tokens: Counter[str]
    num_truncated: Counter[str]
    first_digits: dict[str, Histogram]  # of the rows' places in the order
    quantile_bins: np.ndarray  # int64 (NUM_QUANTILE_BINS,), of all scores over (0, 1)
    answer_tokens: Counter[int]  # rows by their number of answer tokens

    @classmethod
    def total(cls, parts: Iterable["Survey"]) -> "Survey":
        bins = np.zeros(NUM_QUANTILE_BINS, np.int64)
        whole = cls(Counter(), Counter(), Counter(), {}, bins, Counter())
        for part in parts:
            whole.answer_tokens.update(part.answer_tokens)
            whole.num_rows.update(part.num_rows)
            whole.num_tokens.update(part.num_tokens)
            whole.num_truncated.update(part.num_truncated)
            _add_up(whole.first_digits, part.first_digits)
            np.add(whole.quantile_bins, part.quantile_bins, out=whole.quantile_bins)
        return whole


def survey(shards: ShardGroup) -> Survey:
    """The first pass."""
    columns = ("score", "dataset", "num_tokens", "num_answer_tokens", "truncated")
    return Survey.total(
        _survey_block(block) for shard in shards for block in score_blocks(shard, columns)
    )


Thresholds = Mapping[Scope, Threshold]


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The rows that compete in a pass, their order, and what is counted of them."""

    order: Order = field(default_factory=ByScore)
    floors: Thresholds = field(default_factory=dict)
    """Last rows by score that are not too bad; empty for no floor."""
    taken: Thresholds = field(default_factory=dict)
    """Last rows, in the order, that are kept without competing."""
    limits: Sequence[Thresholds] = ()
    """Last rows, in the order, that may compete; rows of other scopes may not."""
    weight: Literal["rows", "tokens"] = "rows"
    """What ranks count: rows, or their answer tokens."""

    def columns(self, scopes: Mapping[Scope, object]) -> tuple[str, ...]:
        needed = {"score", *self.order.columns, *scope_columns(scopes)}
        for thresholds in (self.floors, self.taken, *self.limits):
            needed.update(scope_columns(thresholds))
        if self.weight == "tokens":
            needed.add("num_answer_tokens")
        return tuple(sorted(needed))

    def competing(self, block: ScoreBlock, priorities: np.ndarray) -> np.ndarray | None:
        """bool (N,): which rows of a block compete; None for all."""
        if not (self.floors or self.taken or self.limits):
            return None
        compete = np.ones(len(priorities), dtype=bool)
        if self.floors:
            compete &= kept_by(self.floors, block, block.scores)
        for limit in self.limits:
            compete &= kept_by(limit, block, priorities)
        if self.taken:
            compete &= ~kept_by(self.taken, block, priorities)
        return compete


def kept_by(thresholds: Thresholds, block: ScoreBlock, priorities: np.ndarray) -> np.ndarray:
    """bool (N,): the rows up to the threshold of their scope."""
    kept = np.zeros(len(priorities), dtype=bool)
    for name, rows in rows_by_scope(block, thresholds):
        kept[rows] = thresholds[name].keeps(priorities[rows], block.keys_of(rows))
    return kept


def find_thresholds(
    groups: Sequence[ShardGroup],
    num_kept: Mapping[Scope, int],
    pool: Pool,
    *,
    map_items: MapItems,
    histograms: Mapping[Scope, Histogram] | None = None,
    max_candidates: int = MAX_CANDIDATES,
) -> dict[Scope, Threshold]:
    """The last of the first `num_kept` rows, or answer tokens, of each scope; all in the same
    passes.

    histograms: of first digits, where they are known.
    """
    if not num_kept:
        return {}
    first_buckets: dict[Scope, ScoreBucket] = {}
    for name, number in num_kept.items():
        bucket = ScoreBucket.of_all_rows(number)
        first_buckets[name] = bucket.narrowed(histograms[name]) if histograms else bucket

    def count(wide: ScoreBuckets) -> dict[Scope, Histogram]:
        return add_up(map_items(partial(count_next_digits, pool, wide), groups))

    buckets = narrow(first_buckets, count, max_candidates=max_candidates)
    candidates: dict[Scope, list[Candidates]] = {name: [] for name in buckets}
    for found in map_items(partial(find_candidates, pool, buckets), groups):
        for name, rows in found:
            candidates[name].append(rows)
    return {name: bucket.threshold(candidates[name]) for name, bucket in buckets.items()}


def count_next_digits(
    pool: Pool, buckets: ScoreBuckets, shards: ShardGroup
) -> dict[Scope, Histogram]:
    """A pass: of the rows in each bucket, the digit that narrows it."""

    def counted() -> Iterator[dict[Scope, Histogram]]:
        for name, rows in _rows_in_buckets(pool, buckets, shards):
            digits, held = buckets[name].next_digits(rows.priorities, rows.read_keys)
            weights = None if rows.weights is None else rows.weights[held]
            yield {name: Histogram.of(digits, weights)}

    return add_up(counted())


def find_candidates(
    pool: Pool, buckets: ScoreBuckets, shards: ShardGroup
) -> list[tuple[Scope, Candidates]]:
    """The last pass: the rows in each bucket."""
    found = []
    for name, rows in _rows_in_buckets(pool, buckets, shards):
        candidates = buckets[name].candidates(rows.priorities, rows.read_keys, rows.weights)
        if len(candidates[0]):
            found.append((name, candidates))
    return found


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows and their answer tokens, by dataset."""

    num_rows: Counter[str] = field(default_factory=Counter)
    num_answer_tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def total(cls, parts: Iterable["RowCounts"]) -> "RowCounts":
        whole = cls()
        for part in parts:
            whole.num_rows.update(part.num_rows)
            whole.num_answer_tokens.update(part.num_answer_tokens)
        return whole


def count_rows(pool: Pool, shards: ShardGroup) -> RowCounts:
    """A pass: the rows that compete."""
    columns = {*pool.columns({}), "dataset", "num_answer_tokens"}
    counts = RowCounts()
    for block in _blocks(pool, tuple(sorted(columns)), shards):
        # Floors are of scores: the priorities matter to the other thresholds alone.
        by_order = bool(pool.limits or pool.taken)
        priorities = pool.order.priorities(block) if by_order else block.scores
        competing = pool.competing(block, priorities)
        tokens = block.numbers("num_answer_tokens")
        for name, rows in block.rows_by_dataset():
            inside = slice(None) if competing is None else competing[rows]
            own = tokens[rows][inside]
            counts.num_rows[name] += len(own)
            counts.num_answer_tokens[name] += int(own.sum())
    return counts


def count_score_cells(
    pool: Pool, scopes: Collection[Scope], cell_bits: int, shards: ShardGroup
) -> dict[Scope, Histogram]:
    """A pass: the distribution of the scores of the rows that compete, for rank tables."""
    names = dict.fromkeys(scopes)

    def counted() -> Iterator[dict[Scope, Histogram]]:
        for block in _blocks(pool, pool.columns(names), shards):
            competing = pool.competing(block, block.scores)
            cells = score_cells(block.scores, cell_bits=cell_bits)
            for name, rows in rows_by_scope(block, names):
                inside = slice(None) if competing is None else competing[rows]
                yield {name: Histogram.of(cells[rows][inside])}

    return add_up(counted())


def count_values(values: np.ndarray) -> Counter[int]:
    """How often each value occurs."""
    unique, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(unique.tolist(), counts.tolist(), strict=True)))


def _survey_block(block: ScoreBlock) -> Survey:
    num_tokens, truncated = block.numbers("num_tokens"), block.numbers("truncated")
    digits = first_digits(block.scores)
    bins = np.clip((block.scores * NUM_QUANTILE_BINS).astype(np.int64), 0, NUM_QUANTILE_BINS - 1)
    found = Survey(
        Counter(),
        Counter(),
        Counter(),
        {},
        np.bincount(bins, minlength=NUM_QUANTILE_BINS),
        count_values(block.numbers("num_answer_tokens")),
    )
    for name, rows in block.rows_by_dataset():
        found.num_rows[name] = len(digits[rows])
        found.num_tokens[name] = int(num_tokens[rows].sum())
        found.num_truncated[name] = int(truncated[rows].sum())
        found.first_digits[name] = Histogram.of(digits[rows])
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _ScopeRows:
    """Rows of a block that compete in one scope; M of them."""

    priorities: np.ndarray  # float32 (M,)
    read_keys: ReadKeys
    weights: np.ndarray | None  # int64 (M,), answer tokens; None where rows are counted


def _rows_in_buckets(
    pool: Pool, buckets: ScoreBuckets, shards: ShardGroup
) -> Iterator[tuple[Scope, _ScopeRows]]:
    """The rows that may lie in a bucket."""
    first, last = zip(*(bucket.key_range for bucket in buckets.values()), strict=True)
    blocks = _blocks(pool, pool.columns(buckets), shards, key_range=(min(first), max(last)))
    for block in blocks:
        priorities = pool.order.priorities(block)
        competing = pool.competing(block, priorities)
        tokens = block.numbers("num_answer_tokens") if pool.weight == "tokens" else None
        for name, rows in rows_by_scope(block, buckets):
            chosen = rows if competing is None else _inside(rows, competing)
            weights = None if tokens is None else tokens[chosen].astype(np.int64)
            yield name, _ScopeRows(priorities[chosen], block.keys_of(chosen), weights)


def _blocks(
    pool: Pool,
    columns: tuple[str, ...],
    shards: ShardGroup,
    *,
    key_range: tuple[int, int] = ALL_KEYS,
) -> Iterator[ScoreBlock]:
    """Without the row groups that hold no priority in `key_range`, where statistics tell it."""
    wanted = key_range if isinstance(pool.order, ByScore) else ALL_KEYS
    for shard in shards:
        yield from score_blocks(shard, columns, key_range=wanted)


def _inside(rows: Rows, competing: np.ndarray) -> np.ndarray:
    """int64 (M,): those of the rows that compete."""
    chosen: np.ndarray = (
        np.flatnonzero(competing) if isinstance(rows, slice) else rows[competing[rows]]
    )
    return chosen


def add_up(parts: Iterable[Mapping[Name, Histogram]]) -> dict[Name, Histogram]:
    """The sum of histograms by name; they are merged before they fill memory."""
    pending: dict[Name, list[Histogram]] = {}
    num_pending: Counter[Name] = Counter()
    for part in parts:
        for name, histogram in part.items():
            waiting = pending.setdefault(name, [])
            waiting.append(histogram)
            num_pending[name] += len(histogram.values)
            if num_pending[name] > MAX_PENDING_VALUES + len(waiting[0].values):
                pending[name], num_pending[name] = [Histogram.total(waiting)], 0
    return {name: Histogram.total(waiting) for name, waiting in pending.items()}


def _add_up(totals: dict[Name, Histogram], more: Mapping[Name, Histogram]) -> None:
    for name, histogram in more.items():
        so_far = [totals[name]] if name in totals else []
        totals[name] = Histogram.total([*so_far, histogram])
