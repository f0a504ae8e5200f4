"""A corpus as normalised parquet shards that do not depend on how it was split into files.

Rows are ordered by a key of two hashes, of the id and of the content, and cut into shards of a
fixed size. The same rows in other files, or in another order, give the same shards, so the same
batches and bit for bit the same scores. It is a bucket sort on disk: memory holds one bucket.
"""

import hashlib
import itertools
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.data.writers import write_json, write_parquet
from selectmoe.errors import DataError
from selectmoe.records import Message, RejectedRow, Sample

MAX_ROWS_IN_MEMORY = 20_000
NUM_BUCKETS = 256
SUMMARY_NAME = "summary.json"
SHARD_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("source", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("dataset", pa.string()),
        ("sample_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
KeyedSample = tuple[str, Sample]


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What normalisation read: num_read = rows in shards + num_rejected."""

    num_read: int
    num_rejected: int
    num_shards: int
    num_duplicate_ids: int  # rows whose data set and id another row had before
    read_by_dataset: dict[str, int]
    first_rejected: str  # "<file>:<row>: <reason>" of the first rejected row, or empty


def write_shards(
    rows: Iterable[Sample | RejectedRow],
    directory: Path,
    *,
    rows_per_shard: int,
    max_rows_in_memory: int = MAX_ROWS_IN_MEMORY,
) -> CorpusSummary:
    """Writes shard-000000.parquet …, rejected.parquet and, last, summary.json into `directory`.

    What an interrupted run left in `directory` is removed first.
    Raises DataError when there is no row at all.
    """
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    read_by_dataset: Counter[str] = Counter()
    buckets = _Buckets(directory / "buckets", max_rows_in_memory)
    rejected = _RejectedRows(directory / "rejected.parquet")
    for row in rows:
        read_by_dataset[row.dataset] += 1
        if isinstance(row, Sample):
            buckets.add((row_key(row), row))
        else:
            rejected.add(row)
    num_rejected = rejected.close()
    if not read_by_dataset:
        raise DataError("the corpus has no rows")
    duplicates = _DuplicateCounter()
    num_shards = 0
    for chunk in _chunks(duplicates.watch(buckets.in_order()), rows_per_shard):
        write_parquet(directory / f"shard-{num_shards:06d}.parquet", _shard_table(chunk))
        num_shards += 1
    buckets.remove()
    summary = CorpusSummary(
        num_read=read_by_dataset.total(),
        num_rejected=num_rejected,
        num_shards=num_shards,
        num_duplicate_ids=duplicates.num_duplicate_ids,
        read_by_dataset=dict(sorted(read_by_dataset.items())),
        first_rejected=rejected.first,
    )
    write_json(directory / SUMMARY_NAME, asdict(summary))
    return summary


def read_summary(directory: Path) -> CorpusSummary | None:
    """The summary of a whole corpus; None where normalisation has not finished."""
    file = directory / SUMMARY_NAME
    return CorpusSummary(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def read_shard(path: Path) -> list[KeyedSample]:
    """The samples of one shard with their keys, in their order."""
    return [
        (
            row["row_key"],
            Sample(
                row["dataset"],
                row["id"],
                tuple(Message(**message) for message in row["messages"]),
                row["source"],
            ),
        )
        for row in pq.read_table(path).to_pylist()
    ]


def row_key(sample: Sample) -> str:
    """32 hexadecimal digits: the hash of the id, then that of the data set and the messages."""
    parts = [sample.dataset, *(part for m in sample.messages for part in (m.role, m.content))]
    return _digest([sample.sample_id]) + _digest(parts)


def keep_subset(
    rows: Iterable[Sample | RejectedRow], *, ratio: float
) -> Iterator[Sample | RejectedRow]:
    """About `ratio` of the samples, the same ones however the corpus is split; all rejects."""
    for row in rows:
        if isinstance(row, RejectedRow) or int(row_key(row)[16:], 16) < ratio * 2**64:
            yield row


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


class _Buckets:
    """Samples by the first two digits of their keys, on disk as soon as memory is full."""

    def __init__(self, directory: Path, max_rows_in_memory: int) -> None:
        self.directory = directory
        self.max_rows_in_memory = max_rows_in_memory
        self.in_memory: list[KeyedSample] = []

    def add(self, keyed: KeyedSample) -> None:
        self.in_memory.append(keyed)
        if len(self.in_memory) >= self.max_rows_in_memory:
            self._spill()

    def in_order(self) -> Iterator[KeyedSample]:
        """Every sample by key; exact duplicates get a number behind theirs."""
        if not self.directory.exists():
            yield from _sorted_keys(self.in_memory)
            return
        self._spill()
        for number in range(NUM_BUCKETS):
            yield from _sorted_keys(self._read(number))

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _spill(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.in_memory.sort(key=lambda keyed: keyed[0])
        for prefix, group in itertools.groupby(self.in_memory, key=lambda keyed: keyed[0][:2]):
            with self._file(int(prefix, 16)).open("ab") as file:
                pickle.dump(list(group), file)
        self.in_memory = []

    def _read(self, number: int) -> list[KeyedSample]:
        keyed: list[KeyedSample] = []
        if self._file(number).exists():
            with self._file(number).open("rb") as file:
                for group in _pickles(file):
                    keyed += group
        return keyed

    def _file(self, number: int) -> Path:
        return self.directory / f"{number:02x}.pickle"


def _pickles(file: IO[bytes]) -> Iterator[list[KeyedSample]]:
    # Our own file of a moment ago, never one that a user gives.
    while file.peek(1):  # type: ignore[attr-defined]
        yield pickle.load(file)


def _sorted_keys(keyed: list[KeyedSample]) -> Iterator[KeyedSample]:
    keyed.sort(key=lambda entry: entry[0])
    for _, group in itertools.groupby(keyed, key=lambda entry: entry[0]):
        for number, (key, sample) in enumerate(group):
            yield (f"{key}-{number}" if number else key), sample


class _DuplicateCounter:
    """Counts rows whose (data set, id) came before; equal ids stand together in key order."""

    def __init__(self) -> None:
        self.num_duplicate_ids = 0

    def watch(self, rows: Iterable[KeyedSample]) -> Iterator[KeyedSample]:
        current, seen = "", set[tuple[str, str]]()
        for key, sample in rows:
            if key[:16] != current:
                current, seen = key[:16], set()
            name = (sample.dataset, sample.sample_id)
            self.num_duplicate_ids += name in seen
            seen.add(name)
            yield key, sample


class _RejectedRows:
    """Rejected rows on their way into one parquet file, a thousand at a time."""

    def __init__(self, path: Path) -> None:
        self.partial = path.with_name(f".{path.name}.partial")
        self.path = path
        self.writer = pq.ParquetWriter(self.partial, REJECTED_SCHEMA)
        self.pending: list[dict[str, object]] = []
        self.num_rows = 0
        self.first = ""

    def add(self, row: RejectedRow) -> None:
        self.first = self.first or f"{row.file}:{row.row}: {row.detail}"
        self.pending.append(asdict(row))
        self.num_rows += 1
        if len(self.pending) == 1_000:
            self._flush()

    def close(self) -> int:
        self._flush()
        self.writer.close()
        self.partial.replace(self.path)
        return self.num_rows

    def _flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.pending, schema=REJECTED_SCHEMA))
        self.pending = []


def _chunks(rows: Iterable[KeyedSample], size: int) -> Iterator[list[KeyedSample]]:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _shard_table(rows: Sequence[KeyedSample]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "row_key": key,
                "dataset": sample.dataset,
                "id": sample.sample_id,
                "messages": [{"role": m.role, "content": m.content} for m in sample.messages],
                "source": sample.source,
            }
            for key, sample in rows
        ],
        schema=SHARD_SCHEMA,
    )
