"""Passes over the scored shards of a run: counts, thresholds, and the rows that these keep.

A pass is a function of a group of shards; what it returns for several groups adds up. MapItems
calls it, on threads or on the workers of a cluster.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from selectmoe.corpus.map_items import MapItems
from selectmoe.selection.blocks import Rows, ScoreBlock, score_blocks
from selectmoe.selection.top_k import (
    MAX_CANDIDATES,
    Candidates,
    Histogram,
    ReadKeys,
    Scope,
    ScoreBucket,
    ScoreBuckets,
    Threshold,
    descending_keys,
    first_digits,
    narrow,
    num_to_keep,
)

WHOLE_CORPUS: Scope = None
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


def find_thresholds(
    groups: Sequence[ShardGroup],
    histograms: Mapping[str, Histogram],
    *,
    selection_percentage: float,
    per_dataset: bool,
    map_items: MapItems,
    max_candidates: int = MAX_CANDIDATES,
) -> dict[Scope, Threshold]:
    """One threshold for the whole corpus, or one per dataset; all in the same passes.

    histograms: the survey's, of first digits.
    """
    scopes: dict[Scope, Histogram] = {**dict(sorted(histograms.items()))}
    if not per_dataset:
        scopes = {WHOLE_CORPUS: Histogram.total(histograms.values())}
    first_buckets: dict[Scope, ScoreBucket] = {}
    for name, histogram in scopes.items():
        num_kept = num_to_keep(int(histogram.counts.sum()), selection_percentage)
        first_buckets[name] = ScoreBucket.of_all_rows(num_kept).narrowed(histogram)

    def count(wide: ScoreBuckets) -> dict[Scope, Histogram]:
        totals: dict[Scope, Histogram] = {}
        for counts in map_items(partial(count_next_digits, wide), groups):
            _add_up(totals, counts)
        return totals

    buckets = narrow(first_buckets, count, max_candidates=max_candidates)
    candidates: dict[Scope, list[Candidates]] = {name: [] for name in buckets}
    for found in map_items(partial(find_candidates, buckets), groups):
        for name, rows in found:
            candidates[name].append(rows)
    return {name: bucket.threshold(candidates[name]) for name, bucket in buckets.items()}


def count_next_digits(buckets: ScoreBuckets, shards: ShardGroup) -> dict[Scope, Histogram]:
    """A pass: of the rows in each bucket, the digit that narrows it."""
    totals: dict[Scope, Histogram] = {}
    for name, scores, read_keys in _rows_in_buckets(buckets, shards):
        digits = buckets[name].next_digits(scores, read_keys)
        _add_up(totals, {name: Histogram.of(digits)})
    return totals


def find_candidates(buckets: ScoreBuckets, shards: ShardGroup) -> list[tuple[Scope, Candidates]]:
    """The last pass: the rows in each bucket."""
    found = []
    for name, scores, read_keys in _rows_in_buckets(buckets, shards):
        candidates = buckets[name].candidates(scores, read_keys)
        if len(candidates[0]):
            found.append((name, candidates))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class KeptRows:
    """The rows of a shard that the thresholds keep; M of them."""

    row_numbers: np.ndarray  # int64 (M,), ascending
    scores: np.ndarray  # float32 (M,)
    num_answer_tokens: np.ndarray  # int32 (M,)


def kept_rows(thresholds: Mapping[Scope, Threshold], shard: Path) -> KeptRows:
    """Row groups whose best score is below every threshold are not read."""
    columns = (*_columns(thresholds), "num_answer_tokens")
    row_numbers, all_scores = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    answer_tokens = [np.empty(0, np.int32)]
    lowest = np.array([min(threshold.score for threshold in thresholds.values())], dtype=np.float32)
    key_range = (0, int(descending_keys(lowest)[0]))
    for block in score_blocks(shard, columns, key_range=key_range):
        kept = np.zeros(len(block.scores), dtype=bool)
        for name, rows in _rows_by_name(block, thresholds):
            kept[rows] = thresholds[name].keeps(block.scores[rows], block.keys_of(rows))
        row_numbers.append(block.row_numbers[kept])
        all_scores.append(block.scores[kept])
        answer_tokens.append(block.numbers("num_answer_tokens")[kept])
    return KeptRows(
        row_numbers=np.concatenate(row_numbers),
        scores=np.concatenate(all_scores),
        num_answer_tokens=np.concatenate(answer_tokens),
    )


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


def _rows_in_buckets(
    buckets: ScoreBuckets, shards: Sequence[Path]
) -> Iterator[tuple[Scope, np.ndarray, ReadKeys]]:
    """Name, scores and keys of the rows that may lie in a bucket."""
    first, last = zip(*(bucket.key_range for bucket in buckets.values()), strict=True)
    for shard in shards:
        for block in score_blocks(shard, _columns(buckets), key_range=(min(first), max(last))):
            for name, rows in _rows_by_name(block, buckets):
                yield name, block.scores[rows], block.keys_of(rows)


def _rows_by_name(block: ScoreBlock, names: Mapping[Scope, object]) -> Iterator[tuple[Scope, Rows]]:
    if WHOLE_CORPUS in names:
        yield WHOLE_CORPUS, slice(None)
        return
    for name, rows in block.rows_by_dataset():
        if name in names:
            yield name, rows


def _columns(names: Mapping[Scope, object]) -> tuple[str, ...]:
    return ("score",) if WHOLE_CORPUS in names else ("score", "dataset")


def _add_up(totals: dict[Name, Histogram], more: Mapping[Name, Histogram]) -> None:
    for name, histogram in more.items():
        so_far = [totals[name]] if name in totals else []
        totals[name] = Histogram.total([*so_far, histogram])
