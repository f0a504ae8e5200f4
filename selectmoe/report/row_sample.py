"""A random sample of the rows of a run: what the report counts from texts, not from scores.

Shards hold the rows in the order of their keys, which begin with a hash of the id, and so does
selected_data.jsonl: the first rows of either are a random choice.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.corpus.duplicate_filter import DUPLICATES_NAME
from selectmoe.report.score_survey import EXAMPLES_PER_GROUP, FoundRow, kept_and_margins
from selectmoe.report.scripts import script_of
from selectmoe.selection.blocks import score_blocks
from selectmoe.selection.keep_rule import KeepRule
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import SCORED_SCHEMA

# Shape letters: N = rows of the sample.

SAMPLE_ROWS = 4_000  # a share of half of them is known to 1.6 %, in 95 of 100 samples
MANY_TURNS = 6


@dataclass(frozen=True, slots=True, eq=False)
class RowSample:
    """Scored rows of the pool, with their numbers by row."""

    scores: np.ndarray  # float32 (N,)
    answer_tokens: np.ndarray  # int64 (N,)
    kept: np.ndarray  # bool (N,)
    signals: Mapping[str, np.ndarray]
    """Numbers beside the score, float64 (N,), of each column of numbers that this version does not
    know; NaN where a row has none."""
    places: Sequence[tuple[str, int]]
    """Shard and row of each."""
    margins: np.ndarray  # float64 (N,), score minus threshold

    def where(self, chosen: np.ndarray) -> "RowSample":
        """Some of the rows. chosen: bool (N,)."""
        return RowSample(
            self.scores[chosen],
            self.answer_tokens[chosen],
            self.kept[chosen],
            {name: values[chosen] for name, values in self.signals.items()},
            [self.places[number] for number in np.flatnonzero(chosen).tolist()],
            self.margins[chosen],
        )


@dataclass(frozen=True, slots=True)
class TextCounts:
    """Rows by what their texts are."""

    scripts: Counter[str]
    turns: Counter[str]  # by number of assistant turns
    num_rows: int


def read_sample(folder: RunFolder, rule: KeepRule, *, most: int = SAMPLE_ROWS) -> RowSample:
    """The first scored rows of the shards. folder: of the run that has scored."""
    shards = folder.scored_shards()
    names = _signal_columns(pq.read_schema(shards[0]))
    columns = tuple({"score", "dataset", "num_answer_tokens", *names, *rule.columns})
    parts: list[tuple[np.ndarray, ...]] = []
    places: list[tuple[str, int]] = []
    for shard in shards:
        for block in score_blocks(shard, columns):
            kept_margins = kept_and_margins(block, rule)
            numbers = (block.numbers(name).astype(np.float64) for name in names)
            parts.append(
                (block.scores, block.numbers("num_answer_tokens"), *kept_margins, *numbers)
            )
            places += [(shard.name, row) for row in block.row_numbers.tolist()]
        if len(places) >= most:
            break
    scores, answer_tokens, kept, margins, *signals = (
        np.concatenate(arrays)[:most] for arrays in zip(*parts, strict=True)
    )
    return RowSample(
        scores,
        answer_tokens.astype(np.int64),
        kept,
        dict(zip(names, signals, strict=True)),
        places[:most],
        margins,
    )


def read_duplicates(folder: RunFolder, *, most: int = EXAMPLES_PER_GROUP) -> list[dict[str, str]]:
    """Dataset, id and source of the first rows with exactly the text of another one; none in a run
    without any, or of a version that did not look for them."""
    file = folder.corpus / DUPLICATES_NAME
    if not file.is_file():
        return []
    with pq.ParquetFile(file) as table:
        first = next(table.iter_batches(batch_size=most), None)
        return first.to_pylist() if first is not None else []


def disagreements(sample: RowSample) -> list[FoundRow]:
    """The rows of the sample whose ranks by score and by the first other signal differ most; the
    signal counts in the direction in which it agrees with the score."""
    for values in sample.signals.values():
        known = np.flatnonzero(np.isfinite(values))
        agreement = rank_correlation(sample.scores[known], values[known]) if len(known) else None
        if agreement is None:
            continue
        ranks = [mean_ranks(sample.scores[known]), mean_ranks(values[known])]
        if agreement < 0:
            ranks[1] = len(known) + 1 - ranks[1]
        order = np.argsort(-np.abs(ranks[0] - ranks[1]), kind="stable")
        return [_found_row(sample, n) for n in known[order[:EXAMPLES_PER_GROUP]].tolist()]
    return []


def _found_row(sample: RowSample, number: int) -> FoundRow:
    shard, row = sample.places[number]
    return FoundRow(shard, row, float(sample.scores[number]), float(sample.margins[number]))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's, ties at their mean rank; None where one of the two is constant."""
    ranks = [mean_ranks(values) for values in (first, second)]
    if min(float(np.ptp(values)) for values in ranks) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """float64 (N,): ranks from 1, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return ranks


def count_pool_texts(folder: RunFolder, *, most: int = SAMPLE_ROWS) -> TextCounts:
    """Of the first rows of the corpus."""
    rows = (
        messages
        for shard in folder.corpus_shards()
        for messages in pq.read_table(shard, columns=["messages"])["messages"].to_pylist()
    )
    return _count_texts(itertools.islice(rows, most))


def count_kept_texts(output: RunFolder, *, most: int = SAMPLE_ROWS) -> TextCounts:
    """Of the first rows of selected_data.jsonl."""
    with output.selected_data.open(encoding="utf-8") as lines:
        return _count_texts(json.loads(line)["messages"] for line in itertools.islice(lines, most))


def _count_texts(conversations: Iterable[list[dict[str, Any]]]) -> TextCounts:
    scripts: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    for messages in conversations:
        answers = [entry["content"] for entry in messages if entry["role"] == "assistant"]
        scripts[script_of("\n".join(answers))] += 1
        many = len(answers) >= MANY_TURNS
        turns[f"{MANY_TURNS} or more" if many else str(len(answers))] += 1
    return TextCounts(scripts, turns, scripts.total())


def _signal_columns(schema: pa.Schema) -> list[str]:
    known = set(SCORED_SCHEMA.names)
    return [entry.name for entry in schema if entry.name not in known and _is_number(entry.type)]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
