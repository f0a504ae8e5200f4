"""The shards of a corpus: parquet files of samples in the order of their keys.

`normalize.py` writes them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.corpus.buckets import KeyedSample
from selectmoe.data.message_fields import content_key
from selectmoe.errors import DataError
from selectmoe.records import Message, RejectedRow, Sample

SUMMARY_NAME = "summary.json"
SHARD_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("source", pa.string()),
        # JSON, or null where there is nothing, as in most corpora.
        ("message_fields", pa.string()),  # a list with the fields of each message
        ("tools", pa.string()),
        ("extra_columns", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What normalization read: num_read = num_rows in shards + num_rejected + num_left_out."""

    num_read: int
    num_rejected: int
    num_shards: int
    num_duplicate_ids: int  # rows whose dataset and id another row had before
    read_by_dataset: dict[str, int]
    first_rejected: str  # "<file>:<row>: <reason>" of the first rejected row, or empty
    duplicates_by_dataset: dict[str, int] = field(default_factory=dict)
    """Rows with the text of another one, whose row key is lower."""
    num_left_out: int = 0  # of these, the rows that are in no shard: all or none
    files: dict[str, Any] = field(default_factory=dict)
    """How many files were read, and what of the folders was not."""
    num_unusable_names: int = 0
    """Rows whose dataset or id is a list, an object or too long, and was ignored."""

    @property
    def num_duplicates(self) -> int:
        return sum(self.duplicates_by_dataset.values())

    @property
    def num_rows(self) -> int:
        """Rows in the shards."""
        return self.num_read - self.num_rejected - self.num_left_out


def read_summary(directory: Path) -> CorpusSummary | None:
    """The summary of a complete corpus; None where normalization has not finished."""
    file = directory / SUMMARY_NAME
    return CorpusSummary(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def read_shard(path: Path) -> list[KeyedSample]:
    """The samples of one shard in their order, with their keys."""
    with pq.ParquetFile(path) as file:
        return _keyed_samples(file.read(columns=_columns(file)))


def read_rows(path: Path, row_numbers: np.ndarray) -> Iterator[Sample]:
    """The rows at ascending positions of a shard; row groups without any are not read."""
    with pq.ParquetFile(path) as file:
        first_row = 0
        for number in range(file.num_row_groups):
            end = first_row + file.metadata.row_group(number).num_rows
            wanted = row_numbers[(row_numbers >= first_row) & (row_numbers < end)] - first_row
            first_row = end
            if len(wanted):
                table = file.read_row_group(number, columns=_columns(file)).take(wanted)
                yield from (sample for _, sample in _keyed_samples(table))


def row_key(sample: Sample) -> str:
    """32 hexadecimal digits: the hash of the id, then that of the dataset and the messages."""
    return _key(sample, _framed(_text(sample)))


def row_hashes(sample: Sample) -> tuple[str, bytes]:
    """Its row key, and 16 bytes that are equal for rows with the same text, whatever their ids and
    datasets are."""
    text = _framed(_text(sample))
    return _key(sample, text), hashlib.blake2b(text, digest_size=16).digest()


def keep_subset(
    rows: Iterable[Sample | RejectedRow], *, ratio: float
) -> Iterator[Sample | RejectedRow]:
    """About `ratio` of the samples, independent of how the corpus is split, and all rejected rows.

    Raises DataError when none of the samples is kept.
    """
    num_samples, num_kept = 0, 0
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        num_samples += 1
        if in_subset(row_key(row), ratio):
            num_kept += 1
            yield row
    if num_samples and not num_kept:
        raise nothing_kept(num_samples, ratio)


def in_subset(key: str, ratio: float) -> bool:
    """True where the sample with this row key belongs to the subset of this ratio."""
    return int(key[16:], 16) < ratio * 2**64


def nothing_kept(num_samples: int, ratio: float) -> DataError:
    """The error where a subset is empty."""
    return DataError(f"subset_ratio={ratio:g} keeps none of the {num_samples:,} rows")


def _text(sample: Sample) -> list[str]:
    """All that is said; of a plain conversation its roles and contents alone."""
    parts = [part for message in sample.messages for part in (message.role, message.content)]
    for number, message in enumerate(sample.messages):
        if message.fields and (key := content_key(message)):
            parts += [str(number), key]
    return [*parts, "tools", sample.tools] if sample.tools else parts


def _key(sample: Sample, text: bytes) -> str:
    content = hashlib.blake2b(_framed([sample.dataset]), digest_size=8)
    content.update(text)
    name = hashlib.blake2b(_framed([sample.sample_id]), digest_size=8)
    return name.hexdigest() + content.hexdigest()


def _framed(parts: Iterable[str]) -> bytes:
    """The parts one after the other, each after its length, so that no two lists give the same."""
    pieces: list[bytes] = []
    for part in parts:
        encoded = part.encode()
        pieces += (len(encoded).to_bytes(8, "little"), encoded)
    return b"".join(pieces)


def _columns(file: pq.ParquetFile) -> list[str]:
    """The columns of a sample; a shard of an earlier version has fewer."""
    return [name for name in SHARD_SCHEMA.names if name in file.schema_arrow.names]


def _keyed_samples(table: pa.Table) -> list[KeyedSample]:
    return [
        (
            row["row_key"],
            Sample(
                row["dataset"],
                row["id"],
                tuple(_messages(row)),
                row["source"],
                row.get("tools") or "",
                row.get("extra_columns") or "",
            ),
        )
        for row in table.to_pylist()
    ]


def _messages(row: Mapping[str, Any]) -> Iterator[Message]:
    fields = row.get("message_fields")
    if fields is None:
        yield from (Message(**message) for message in row["messages"])
        return
    for message, text in zip(row["messages"], json.loads(fields), strict=True):
        yield Message(**message, fields=text)


def _fields(sample: Sample) -> str | None:
    fields = [message.fields for message in sample.messages]
    return json.dumps(fields, ensure_ascii=False) if any(fields) else None


def shard_table(rows: Sequence[KeyedSample]) -> pa.Table:
    """The rows of one shard as a table of SHARD_SCHEMA."""
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
        pa.array([_fields(sample) for sample in samples], pa.string()),
        pa.array([sample.tools or None for sample in samples], pa.string()),
        pa.array([sample.extra_columns or None for sample in samples], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)
