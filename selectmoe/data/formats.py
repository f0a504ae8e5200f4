"""Reads the rows of one file: lines of .jsonl (or .jsonl.gz), row groups of .parquet."""

import codecs
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.data.rows import ROW_KEYS, RowLocation, parse_row
from selectmoe.errors import DataError, one_line
from selectmoe.records import RejectedRow, Sample

_BATCH_ROWS = 256
_CHUNK_BYTES = 1 << 20
# How files begin that cannot be lines of UTF-8, whatever their names say.
_NOT_JSONL = {
    b"\x1f\x8b": "is gzip-compressed: its name must end in .jsonl.gz",
    b"PAR1": "is a parquet file: its name must end in .parquet",
    codecs.BOM_UTF16_LE: "must be UTF-8, is UTF-16",
    codecs.BOM_UTF16_BE: "must be UTF-8, is UTF-16",
}
Rows = Iterator[Sample | RejectedRow]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileSlice:
    """The part of a file that one process reads: of .jsonl the lines that begin in the bytes
    [start, stop), of .parquet the row groups [start, stop). A .jsonl.gz is read as a whole."""

    path: str
    start: int = 0
    stop: int | None = None  # None: to the end
    first_row: int = 1  # its number in the file; blank lines count


def read_slice(filesystem: pafs.FileSystem, part: FileSlice, max_row_bytes: int) -> Rows:
    """The rows of a slice, by the ending of its file's name. Raises DataError for a broken file."""
    return READERS[require_ending(part.path)](filesystem, part, max_row_bytes)


def find_ending(path: str) -> str | None:
    """The ending of a readable file's name; None for other files."""
    return next((ending for ending in READERS if path.endswith(ending)), None)


def require_ending(path: str) -> str:
    ending = find_ending(path)
    if ending is None:
        raise DataError(f"{path}: file name must end in {', '.join(READERS)}")
    return ending


def parse_object(
    row: dict[str, Any], location: RowLocation, max_row_bytes: int
) -> Sample | RejectedRow:
    outcome = parse_row(row, location)
    if isinstance(outcome, Sample):
        size = sum(len(message.content.encode()) for message in outcome.messages)
        if size > max_row_bytes:
            location = replace(location, dataset=outcome.dataset)
            return _too_large(location, size, max_row_bytes, sample_id=outcome.sample_id)
    return outcome


def translate_errors(items: Iterable[T], complaint: str) -> Iterator[T]:
    """Yields `items`; an exception of their source becomes a DataError beginning with `complaint`.

    Clients of object stores and of the hub raise dozens of types, many of them not an OSError.
    """
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{complaint}: {one_line(error)}") from error
        yield item


def _dataset_of(path: str) -> str:
    """The file's name without its ending."""
    return Path(path).name.removesuffix(find_ending(path) or "")


def _read_jsonl(filesystem: pafs.FileSystem, part: FileSlice, max_row_bytes: int) -> Rows:
    dataset = _dataset_of(part.path)
    lines = translate_errors(
        _lines_of(filesystem, part, max_row_bytes), f"{part.path}: cannot be read to its end"
    )
    for number, (line, size) in enumerate(lines, start=part.first_row):
        location = RowLocation(part.path, number, dataset)
        if size > max_row_bytes:
            yield _too_large(location, size, max_row_bytes)
        elif line.strip():
            yield _parse_line(line, location)


def _lines_of(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int
) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes) for the lines that begin in `part`."""
    # One byte early: if that byte ends a line, the next line begins in the slice.
    begin = max(part.start - 1, 0)
    for line, size in _lines(_chunks(filesystem, part.path, begin), limit):
        if part.stop is not None and begin >= part.stop:
            return
        if begin >= part.start:
            yield line, size
        begin += size + 1


def _lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes); of a line over the limit only the beginning.

    Never holds more of a line than `limit` and a chunk.
    """
    rest, size = b"", 0
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield rest + line, size + len(line)
            rest, size = b"", 0
        size += len(last)
        rest = rest + last if size <= limit else (rest + last)[:100]
    if size:
        yield rest, size


def _chunks(filesystem: pafs.FileSystem, path: str, begin: int) -> Iterator[bytes]:
    if begin:
        with filesystem.open_input_file(path) as file:
            file.seek(begin)
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        return
    # Buffered: gzip reads a few kilobytes at a time, and each would be a request to the store.
    with filesystem.open_input_stream(path, compression=None, buffer_size=_CHUNK_BYTES) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        chunk = stream.read(_CHUNK_BYTES)
        _require_text(chunk, path)
        while chunk:
            yield chunk
            chunk = stream.read(_CHUNK_BYTES)


def _require_text(chunk: bytes, path: str) -> None:
    for beginning, complaint in _NOT_JSONL.items():
        if chunk.startswith(beginning):
            raise DataError(f"{path}: {complaint}")


def _parse_line(line: bytes, location: RowLocation) -> Sample | RejectedRow:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return location.reject("invalid_utf8", f"line {location.row} is not valid UTF-8: {error}")
    except json.JSONDecodeError as error:
        detail = f"line {location.row} is not valid JSON: {error.msg}, at column {error.colno}"
        return location.reject("invalid_json", detail)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 lists nested
        return location.reject("invalid_json", f"line {location.row} is not readable JSON: {error}")
    return parse_row(row, location)


def _read_parquet(filesystem: pafs.FileSystem, part: FileSlice, max_row_bytes: int) -> Rows:
    path, dataset = part.path, _dataset_of(part.path)
    number = part.first_row - 1
    batches = translate_errors(_batches(filesystem, part), f"{path}: not a readable parquet file")
    for batch, other_columns in batches:
        for row in _batch_rows(batch):
            number += 1
            location = RowLocation(path, number, dataset)
            if isinstance(row, ValueError):
                detail = f"row {number} cannot be decoded: {one_line(row)}"
                yield location.reject("unreadable_row", detail)
            else:
                yield parse_object(other_columns | row, location, max_row_bytes)


def _batches(
    filesystem: pafs.FileSystem, part: FileSlice
) -> Iterator[tuple[pa.RecordBatch, dict[str, None]]]:
    """Batches of the known columns, and the names of the others, whose values are never read."""
    with filesystem.open_input_file(part.path) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        other_columns = dict.fromkeys(name for name in names if name not in ROW_KEYS)
        columns = [name for name in names if name in ROW_KEYS]
        stop = parquet.num_row_groups if part.stop is None else part.stop
        groups = list(range(part.start, stop))
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
            yield batch, other_columns


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | ValueError]:
    """The rows; for one that cannot be decoded (text that is not UTF-8), the error."""
    try:
        return batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    except ValueError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for n in range(batch.num_rows) for row in _batch_rows(batch.slice(n, 1))]


def _too_large(
    location: RowLocation, size: int, max_row_bytes: int, *, sample_id: str = ""
) -> RejectedRow:
    detail = f"a row must have at most {max_row_bytes:,} bytes, got {size:,}"
    return location.reject("row_too_large", detail, sample_id=sample_id)


READERS: dict[str, Callable[[pafs.FileSystem, FileSlice, int], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
