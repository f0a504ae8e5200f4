"""Leaves rows with the text of another one out of the shards, or counts them there."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.corpus.buckets import KeyedSample
from selectmoe.records import Sample

DUPLICATES_NAME = "duplicates.parquet"
DUPLICATES_SCHEMA = pa.schema([(name, pa.string()) for name in ("dataset", "id", "source")])
Duplicates = Literal["drop", "keep"]
"""What becomes of rows that have the text of another one."""


class DuplicateRows:
    """Writes where duplicates were read into a parquet file, in blocks of a thousand."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.by_dataset: Counter[str] = Counter()
        self.pending: list[dict[str, str]] = []

    def __enter__(self) -> "DuplicateRows":
        self.writer = pq.ParquetWriter(self.file, DUPLICATES_SCHEMA)
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self.writer.close()

    def add(self, sample: Sample) -> None:
        self.by_dataset[sample.dataset] += 1
        self.pending.append(
            {"dataset": sample.dataset, "id": sample.sample_id, "source": sample.source}
        )
        if len(self.pending) == 1_000:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.pending, schema=DUPLICATES_SCHEMA))
        self.pending = []


class DuplicateFilter:
    """Finds rows with the text of another one, and counts rows whose (dataset, id) came before;
    rows with equal ids are neighbours by key."""

    def __init__(self, keys: Iterator[str], found: DuplicateRows, rule: Duplicates) -> None:
        self.keys = keys  # of rows whose text another row with a lower key has, in their order
        self.found = found
        self.rule = rule
        self.num_duplicate_ids = 0

    def number(self, rows: Iterable[KeyedSample]) -> Iterator[KeyedSample]:
        """The rows that stay; a number after the key of exact duplicates makes all keys differ."""
        previous, number, seen = "", 0, set[tuple[str, str]]()
        next_duplicate = next(self.keys, "")
        for key, sample in rows:
            if key[:16] != previous[:16]:  # another id
                seen = set()
            number = number + 1 if key == previous else 0
            previous = key
            while next_duplicate and next_duplicate < key:
                next_duplicate = next(self.keys, "")
            if number or key == next_duplicate:
                self.found.add(sample)
                if self.rule == "drop":
                    continue
            name = (sample.dataset, sample.sample_id)
            self.num_duplicate_ids += name in seen
            seen.add(name)
            yield (f"{key}-{number}" if number else key), sample
