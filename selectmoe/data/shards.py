"""A corpus as normalised parquet shards that do not depend on how it was split into files.

Rows are ordered by a key of two hashes, of the id and of the content, and cut into shards of a
fixed size. The same rows in other files, or in another order, give the same shards, so the same
batches and bit for bit the same scores; only `source`, where a row was read, differs. It is a
bucket sort on disk, so memory does not grow with the corpus: it holds MAX_ROWS_IN_MEMORY rows, or
MAX_CHARACTERS of text if these are fewer, beside a shard of at most as much text.
"""

import hashlib
import itertools
import json
import operator
import pickle
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.data.writers import whole_file, write_json, write_parquet
from selectmoe.errors import DataError
from selectmoe.records import Message, RejectedRow, Sample

MAX_ROWS_IN_MEMORY = 20_000
MAX_CHARACTERS = 1 << 27
KEY_DIGITS = 32
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
_KEY = operator.itemgetter(0)


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
    duplicates = _DuplicateCounter()
    num_shards = 0
    with tempfile.TemporaryDirectory(prefix="buckets-", dir=directory) as folder:
        buckets = _Buckets(Path(folder), max_rows_in_memory)
        with (
            whole_file(directory / "rejected.parquet") as file,
            pq.ParquetWriter(file, REJECTED_SCHEMA) as writer,
        ):
            rejected = _RejectedRows(writer)
            for row in rows:
                read_by_dataset[row.dataset] += 1
                if isinstance(row, Sample):
                    buckets.add((row_key(row), row))
                else:
                    rejected.add(row)
            rejected.flush()
        if not read_by_dataset:
            raise DataError("the corpus has no rows")
        for chunk in _chunks(_with_numbers(duplicates.watch(buckets.in_order())), rows_per_shard):
            write_parquet(directory / f"shard-{num_shards:06d}.parquet", _shard_table(chunk))
            num_shards += 1
    summary = CorpusSummary(
        num_read=read_by_dataset.total(),
        num_rejected=rejected.num_rows,
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
    return _keyed_samples(pq.read_table(path))


def read_rows(path: Path, row_numbers: np.ndarray) -> Iterator[Sample]:
    """Some rows of a shard, by ascending positions; row groups without any are not read."""
    with pq.ParquetFile(path) as file:
        first_row = 0
        for number in range(file.num_row_groups):
            end = first_row + file.metadata.row_group(number).num_rows
            wanted = row_numbers[(row_numbers >= first_row) & (row_numbers < end)] - first_row
            first_row = end
            if len(wanted):
                table = file.read_row_group(number).take(wanted)
                yield from (sample for _, sample in _keyed_samples(table))


def row_key(sample: Sample) -> str:
    """32 hexadecimal digits: the hash of the id, then that of the data set and the messages."""
    parts = [sample.dataset, *(part for m in sample.messages for part in (m.role, m.content))]
    return _digest([sample.sample_id]) + _digest(parts)


def keep_subset(
    rows: Iterable[Sample | RejectedRow], *, ratio: float
) -> Iterator[Sample | RejectedRow]:
    """About `ratio` of the samples, the same ones however the corpus is split; all rejects.

    Raises DataError when none of the samples is kept.
    """
    num_samples, num_kept = 0, 0
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        num_samples += 1
        if int(row_key(row)[16:], 16) < ratio * 2**64:
            num_kept += 1
            yield row
    if num_samples and not num_kept:
        raise DataError(f"subset_ratio={ratio:g} keeps none of the {num_samples:,} rows")


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _keyed_samples(table: pa.Table) -> list[KeyedSample]:
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
        for row in table.to_pylist()
    ]


def _num_characters(sample: Sample) -> int:
    return sum(len(message.content) for message in sample.messages)


class _Buckets:
    """Samples by two digits of their keys, on disk as soon as memory is full.

    A bucket that is itself too large (of a large corpus, or because every row has the same id) is
    cut again, by the next two digits.
    """

    def __init__(self, directory: Path, max_rows_in_memory: int, *, first_digit: int = 0) -> None:
        self.directory = directory
        self.max_rows_in_memory = max_rows_in_memory
        self.digits = slice(first_digit, first_digit + 2)
        self.in_memory: list[KeyedSample] = []
        # Of the room for rows and text: what memory holds, and each bucket on disk.
        self.share_in_memory = 0.0
        self.shares: defaultdict[str, float] = defaultdict(float)

    def add(self, keyed: KeyedSample) -> None:
        self.in_memory.append(keyed)
        self.share_in_memory += self._share(keyed)
        if self.share_in_memory >= 1:
            self._spill()

    def in_order(self) -> Iterator[KeyedSample]:
        """Every sample by key, once; samples of one key in the order in which they were added."""
        if not self.shares:
            yield from sorted(self.in_memory, key=_KEY)
            return
        self._spill()
        for bucket in sorted(self.shares):
            yield from self._bucket_in_order(bucket)
            self._file(bucket).unlink()

    def _bucket_in_order(self, bucket: str) -> Iterator[KeyedSample]:
        rows = self._read(bucket)
        if self.shares[bucket] <= 1:
            yield from sorted(rows, key=_KEY)
        elif self.digits.stop == KEY_DIGITS:
            yield from rows  # all of one key
        else:
            inner = _Buckets(
                self.directory / bucket, self.max_rows_in_memory, first_digit=self.digits.stop
            )
            for keyed in rows:
                inner.add(keyed)
            yield from inner.in_order()

    def _share(self, keyed: KeyedSample) -> float:
        return 1 / self.max_rows_in_memory + _num_characters(keyed[1]) / MAX_CHARACTERS

    def _spill(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.in_memory.sort(key=_KEY)
        for bucket, group in itertools.groupby(self.in_memory, lambda keyed: keyed[0][self.digits]):
            rows = list(group)
            self.shares[bucket] += sum(map(self._share, rows))
            with self._file(bucket).open("ab") as file:
                pickle.dump(rows, file)
        self.in_memory, self.share_in_memory = [], 0.0

    def _read(self, bucket: str) -> Iterator[KeyedSample]:
        # Our own file of a moment ago, never one that a user gives.
        with self._file(bucket).open("rb") as file:
            while file.peek(1):
                yield from pickle.load(file)

    def _file(self, bucket: str) -> Path:
        return self.directory / f"{bucket}.pickle"


def _with_numbers(rows: Iterable[KeyedSample]) -> Iterator[KeyedSample]:
    """Exact duplicates get a number behind their key, so that no two rows have the same."""
    previous, number = "", 0
    for key, sample in rows:
        number = number + 1 if key == previous else 0
        previous = key
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

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self.pending: list[dict[str, object]] = []
        self.num_rows = 0
        self.first = ""

    def add(self, row: RejectedRow) -> None:
        self.first = self.first or f"{row.file}:{row.row}: {row.detail}"
        self.pending.append(asdict(row))
        self.num_rows += 1
        if len(self.pending) == 1_000:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.pending, schema=REJECTED_SCHEMA))
        self.pending = []


def _chunks(rows: Iterable[KeyedSample], size: int) -> Iterator[list[KeyedSample]]:
    """Lists of `size` rows, or of fewer where they hold more text than memory is meant to."""
    chunk: list[KeyedSample] = []
    num_characters = 0
    for keyed in rows:
        chunk.append(keyed)
        num_characters += _num_characters(keyed[1])
        if len(chunk) == size or num_characters >= MAX_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _shard_table(rows: Sequence[KeyedSample]) -> pa.Table:
    samples = [sample for _, sample in rows]
    messages = [message for sample in samples for message in sample.messages]
    ends = itertools.accumulate((len(sample.messages) for sample in samples), initial=0)
    turns = pa.StructArray.from_arrays(
        [
            pa.array([message.role for message in messages], pa.string()),
            pa.array([message.content for message in messages], pa.string()),
        ],
        names=["role", "content"],
    )
    columns = [
        pa.array([key for key, _ in rows], pa.string()),
        pa.array([sample.dataset for sample in samples], pa.string()),
        pa.array([sample.sample_id for sample in samples], pa.string()),
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), turns),
        pa.array([sample.source for sample in samples], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)
