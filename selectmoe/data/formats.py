"""Reads the rows of one file: lines or values of JSON, tables in text, parquet and Arrow."""

import codecs
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc
import pyarrow.parquet as pq

from selectmoe.config.columns import LAYOUT_COLUMNS, ColumnRules
from selectmoe.data.byte_streams import (
    read_chunks,
    require_no_pointer,
    split_lines,
    translate_errors,
    without_mark,
)
from selectmoe.data.csv_rows import require_unique, split_rows
from selectmoe.data.endings import Format, require_ending, without_ending
from selectmoe.data.json_values import split_values
from selectmoe.data.layouts import without_null_keys
from selectmoe.data.row_errors import abridge
from selectmoe.data.rows import READ_ALL, RowLocation, parse_row
from selectmoe.errors import DataError, one_line
from selectmoe.records import RejectedRow, Sample

_BATCH_ROWS = 256
_BATCH_BYTES = 64 << 20
_ARROW_FILE = b"ARROW1"
# Of text that is not UTF-8, a time beyond the year 9999, and an unknown time zone.
_UNDECODABLE = (ValueError, OverflowError, LookupError)
_MARK = codecs.BOM_UTF8
Rows = Iterator[Sample | RejectedRow]
RawRows = Iterator[tuple[RowLocation, object]]
"""What a file has for each row, and a RejectedRow for one that cannot be read at all."""
Columns = frozenset[str] | None
"""The columns of a table that are read; None: all."""
Batches = Iterator[tuple[pa.RecordBatch, dict[str, None]]]


@dataclass(frozen=True, slots=True)
class _NoRow:
    """Stands for a row of a table that cannot be decoded."""

    complaint: str


@dataclass(frozen=True, slots=True)
class FileSlice:
    """The part of a file that one process reads: of a .jsonl the lines that begin in the bytes
    [start, stop), of a .parquet the row groups [start, stop). Other files are read as a whole."""

    path: str
    start: int = 0
    stop: int | None = None  # None: to the end
    first_row: int = 1  # its number in the file; blank lines count
    name: str = ""  # the path below what was given, which names rows; empty: the file's own name
    dataset: str = ""  # of rows that name none; empty: the name without its ending

    def location(self, row: int) -> RowLocation:
        name = self.name or self.path.rpartition("/")[2]
        return RowLocation(self.path, row, self.dataset or without_ending(name), name)


def read_slice(
    filesystem: pafs.FileSystem,
    part: FileSlice,
    max_row_bytes: int,
    rules: ColumnRules = READ_ALL,
) -> Rows:
    """The rows of a slice, by the ending of its file's name. Raises DataError for a broken file."""
    kind = require_ending(part.path).format
    # A line within the limit has no content over it; a table's row is as long as its contents.
    is_text = kind in ("lines", "json")
    parse = parse_row if is_text else partial(parse_object, limit=max_row_bytes)
    for location, row in READERS[kind](filesystem, part, max_row_bytes, rules.wanted_columns()):
        yield row if isinstance(row, RejectedRow) else parse(row, location, rules)


def read_objects(filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row of a file, with all its columns, and its number.

    Raises DataError for a broken file, and for a row that is no object.
    """
    read = READERS[require_ending(path).format]
    for location, row in read(filesystem, FileSlice(path), sys.maxsize, None):
        if isinstance(row, RejectedRow):
            raise DataError(f"{path}:{row.row}: {row.detail}")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{location.row}: a row must be a JSON object, got {abridge(row)}"
            )
        yield location.row, row


def is_sliceable(path: str) -> bool:
    """True for lines that can be read from any byte on."""
    ending = require_ending(path)
    return ending.format == "lines" and not ending.compression


def parse_object(
    row: object, location: RowLocation, rules: ColumnRules = READ_ALL, *, limit: int
) -> Sample | RejectedRow:
    """As `parse_row`, for the row of a table; a sample with more than `limit` bytes of text is
    rejected."""
    row = without_null_keys(row) if isinstance(row, Mapping) else row
    outcome = parse_row(row, location, rules)
    if isinstance(outcome, Sample):
        size = sum(len(text.encode()) for text in (*outcome.texts(), outcome.extra_columns))
        if size > limit:
            location = replace(location, dataset=outcome.dataset)
            rejected = _too_large(location, size, limit, sample_id=outcome.sample_id)
            if not outcome.extra_columns:
                return rejected
            hint = "dataset.extra_columns=drop leaves out columns that nothing reads"
            return replace(rejected, detail=f"{rejected.detail}; {hint}")
    return outcome


def _read_lines(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int, columns: Columns
) -> RawRows:
    lines = translate_errors(_lines_of(filesystem, part, limit), _cut_short(part))
    return _parse_texts(lines, part, limit, "line")


def _read_json(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int, columns: Columns
) -> RawRows:
    """The lines of a file whose first line is an object; else the values of one array, or objects
    over several lines. Rows are lines of the first and values of the others."""
    chunks = read_chunks(filesystem, part.path)
    beginning = b""
    for chunk in translate_errors(chunks, _cut_short(part)):
        beginning += chunk
        if b"\n" in beginning.lstrip() or len(beginning) > limit:
            break
    first_line = without_mark(beginning).lstrip().partition(b"\n")[0]
    chunks = chain([beginning], chunks)
    if _is_object(first_line):
        lines = translate_errors(split_lines(chunks, limit), _cut_short(part))
        return _parse_texts(lines, part, limit, "line")
    values = translate_errors(split_values(chunks, limit, part.path), _cut_short(part))
    return _parse_texts(values, part, limit, "row")


def _parse_texts(
    texts: Iterable[tuple[bytes, int]], part: FileSlice, limit: int, unit: str
) -> RawRows:
    first = part.location(part.first_row)
    path, dataset, name = first.file, first.dataset, first.name
    for number, (text, size) in enumerate(texts, start=part.first_row):
        location = RowLocation(path, number, dataset, name)
        if size > limit:
            yield location, _too_large(location, size, limit)
            continue
        if text[:1] == _MARK[:1]:
            text = without_mark(text)
        if text.strip():
            yield location, _parse_text(text, location, unit)


def _lines_of(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int
) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes) for the lines that begin in `part`."""
    # One byte early: if that byte ends a line, the next line begins in the slice.
    begin = max(part.start - 1, 0)
    for line, size in split_lines(read_chunks(filesystem, part.path, begin=begin), limit):
        if part.stop is not None and begin >= part.stop:
            return
        if begin >= part.start:
            yield line, size
        begin += size + 1


def _parse_text(text: bytes, location: RowLocation, unit: str) -> object:
    """The JSON value of a line or an element; a RejectedRow where it is none."""
    where = f"{unit} {location.row}"
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return location.reject("invalid_utf8", f"{where} is not valid UTF-8: {error}")
    except json.JSONDecodeError as error:
        detail = f"{where} is not valid JSON: {error.msg}, at column {error.colno}"
        return location.reject("invalid_json", detail)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 lists nested
        return location.reject("invalid_json", f"{where} is not readable JSON: {error}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int, columns: Columns
) -> RawRows:
    delimiter = "\t" if require_ending(part.path).format == "tsv" else ","
    lines = split_lines(read_chunks(filesystem, part.path), limit)
    rows = split_rows(lines, part.path, delimiter=delimiter, limit=limit)
    for row in translate_errors(rows, _cut_short(part)):
        location = part.location(row.line)
        if row.size:
            yield location, _too_large(location, row.size, limit)
        elif row.reason:
            yield location, location.reject(row.reason, row.detail)
        else:
            yield location, row.cells


def _read_batches(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int, columns: Columns
) -> RawRows:
    kind = require_ending(part.path).format
    read = _parquet_batches if kind == "parquet" else _arrow_batches
    complaint = f"{part.path}: not a readable {kind.capitalize() if kind == 'arrow' else kind} file"
    number = part.first_row - 1
    for batch, other_columns in translate_errors(read(filesystem, part, columns), complaint):
        for row in _batch_rows(batch):
            number += 1
            location = part.location(number)
            if isinstance(row, _NoRow):
                detail = f"row {number} cannot be decoded: {row.complaint}"
                yield location, location.reject("unreadable_row", detail)
            else:
                yield location, other_columns | row


def _parquet_batches(filesystem: pafs.FileSystem, part: FileSlice, columns: Columns) -> Batches:
    """Batches of the wanted columns, and the names of the others, whose values are never read."""
    with filesystem.open_input_file(part.path) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowException:
            require_no_pointer(filesystem, part.path)
            raise
        wanted, others = _wanted(parquet.schema_arrow.names, columns, part.path)
        stop = parquet.num_row_groups if part.stop is None else part.stop
        groups = list(range(part.start, stop))
        num_rows = _rows_per_batch(parquet.metadata)
        for batch in parquet.iter_batches(num_rows, row_groups=groups, columns=wanted):
            yield batch, others


def _arrow_batches(filesystem: pafs.FileSystem, part: FileSlice, columns: Columns) -> Batches:
    """The same of an Arrow file (Feather), or of the stream that `datasets` keeps in its cache."""
    with filesystem.open_input_file(part.path) as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        try:
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        except pa.ArrowException:
            require_no_pointer(filesystem, part.path)
            raise
        wanted, others = _wanted(reader.schema.names, columns, part.path)
        whole = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in whole:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS).select(wanted), others


def _wanted(names: Sequence[str], columns: Columns, path: str) -> tuple[list[str], dict[str, None]]:
    require_unique(names, path)
    wanted = [name for name in names if columns is None or name in columns]
    return wanted, dict.fromkeys(name for name in names if name not in wanted)


def _rows_per_batch(metadata: pq.FileMetaData) -> int:
    """At most _BATCH_ROWS; fewer of rows that are long, as those with images beside the text."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    num_bytes: int = sum(g.total_byte_size for g in groups) // max(metadata.num_rows, 1)
    return max(min(_BATCH_ROWS, _BATCH_BYTES // max(num_bytes, 1)), 1)


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | _NoRow]:
    """The rows; for one that cannot be decoded (text that is not UTF-8), why not."""
    try:
        return batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    except _UNDECODABLE:
        if batch.num_rows == 1:
            return [_decode_row(batch)]
        return [row for n in range(batch.num_rows) for row in _batch_rows(batch.slice(n, 1))]


def _decode_row(batch: pa.RecordBatch) -> dict[str, Any] | _NoRow:
    """The only row of a batch, of which a column cannot be decoded.

    A column that is no part of a layout is read otherwise: text that is not UTF-8 as bytes, a time
    that Python has not (in nanoseconds) as text, and one that Arrow has not as its number.
    """
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except _UNDECODABLE as error:
            complaint = _NoRow(f"column {name!r}: {type(error).__name__}: {one_line(error)}")
            if name in LAYOUT_COLUMNS:
                return complaint
            try:
                row[name] = _decode_otherwise(column)
            except (pa.ArrowException, ValueError):
                return complaint
    return row


def _decode_otherwise(column: pa.Array) -> object:
    if not pa.types.is_temporal(column.type):
        return column.cast(pa.large_binary())[0].as_py()
    text = column.cast(pa.string())[0].as_py()
    # Beyond the year 32767 Arrow writes "<value out of range: …>".
    return column.cast(pa.int64())[0].as_py() if text.startswith("<") else text


def _too_large(
    location: RowLocation, size: int, max_row_bytes: int, *, sample_id: str = ""
) -> RejectedRow:
    detail = f"a row must have at most {max_row_bytes:,} bytes, got {size:,}"
    return location.reject("row_too_large", detail, sample_id=sample_id)


def _cut_short(part: FileSlice) -> str:
    return f"{part.path}: cannot be read to its end"


READERS: dict[Format, Callable[[pafs.FileSystem, FileSlice, int, Columns], RawRows]] = {
    "lines": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_batches,
    "arrow": _read_batches,
}
