"""A corpus as a stream of samples: files, folders and globs of them, object stores, the hub."""

import codecs
import difflib
import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.data.rows import ROW_KEYS, RowPlace, parse_row
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

MAX_ROW_BYTES = 10_000_000
HUB_PREFIX = "hub:"
GCS_RETRY_SECONDS = 15
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
    """What one process reads of a file: of .jsonl the lines that begin at the bytes from `start` to
    before `stop`, of .parquet the row groups from `start` to before `stop`; other files as a whole.
    """

    path: str
    start: int = 0
    stop: int | None = None  # None: to the end
    first_row: int = 1  # its number in the file; blank lines count


def read_corpora(specs: Sequence[str], *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of several corpora, one after the other; see `read_corpus`."""
    for spec in specs:
        yield from read_corpus(spec, max_row_bytes=max_row_bytes)


def read_corpus(spec: str, *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of `spec` as samples, and those that break the contract as RejectedRow.

    spec: a .jsonl, .jsonl.gz or .parquet file; a folder (with its subfolders) or glob of them; the
    same behind a URL (s3://, gs://, …); or hub:NAME[:split], the split being train by default.
    Files are read in natural order: part-2 before part-10. In a folder, other files and names that
    begin with . or _ are passed over. A blank line of a .jsonl file is no row, but it is counted
    where rows are numbered.
    Raises DataError where nothing is readable, a file is broken, or the hub does not answer.
    """
    if spec.startswith(HUB_PREFIX):
        yield from _read_hub(spec, max_row_bytes)
        return
    filesystem, path = locate(spec)
    slices = [FileSlice(file) for file in list_files(filesystem, path, spec)]
    num_rows = 0
    for row in read_slices(filesystem, slices, max_row_bytes=max_row_bytes):
        num_rows += 1
        yield row
    if not num_rows:
        raise DataError(f"{spec}: no rows: every file is empty")


def read_slices(
    filesystem: pafs.FileSystem,
    slices: Iterable[FileSlice],
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Rows:
    """The rows of `slices`, one after the other, as `read_corpus` gives those of whole files."""
    for part in slices:
        yield from _reader(part.path)(filesystem, part, max_row_bytes)


def require_readable(specs: Sequence[str]) -> None:
    """Raises DataError, as `read_corpus` would, where a corpus has no file; reads none of them."""
    for spec in specs:
        if not spec.startswith(HUB_PREFIX):
            list_files(*locate(spec), spec)


def _translated(items: Iterable[T], complaint: str) -> Iterator[T]:
    """`items`; what their source raises becomes a DataError that begins with `complaint`.

    The clients of object stores and of the hub raise dozens of kinds, many of them not an OSError.
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
            raise DataError(f"{complaint}: {_one_line(error)}") from error
        yield item


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def locate(spec: str) -> tuple[pafs.FileSystem, str]:
    """Where the files of `spec` are, and the path there. Raises DataError where nothing answers."""
    if "://" not in spec:
        if not spec:
            raise DataError("a corpus must be a file, a folder, a glob, a URL or hub:NAME, got ''")
        return pafs.LocalFileSystem(), str(Path(spec).expanduser().absolute())
    try:
        return _from_url(spec)
    except Exception as error:  # as in `_translated`
        raise DataError(f"{spec}: cannot be reached: {_one_line(error)}") from error


def _from_url(url: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(_quoted(url))
        return filesystem, path
    except NotImplementedError:
        pass  # Arrow was built without this store
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _quoted(url: str) -> str:
    """What a glob or a name may hold and a URL may not is quoted; Arrow's settings are kept.

    s3://b/part-?[ab].jsonl?region=eu-west-1 -> s3://b/part-%3F%5Bab%5D.jsonl?region=eu-west-1
    """
    found = re.search(r"\?\w+=.*", url, re.DOTALL)
    settings = found[0] if found else ""
    address = url.removesuffix(settings)
    if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in settings:
        # Without a network or credentials Arrow would try for 15 minutes.
        settings += f"{'&' if settings else '?'}retry_limit_seconds={GCS_RETRY_SECONDS}"
    return quote(address, safe="/:@%*!$&'()+,;=~") + settings


def list_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    """The files that `read_corpus` reads of `spec`, in its order. Raises DataError as it does."""
    try:
        files = _matching_files(filesystem, path, spec)
    except DataError:
        raise
    except Exception as error:  # as in `_translated`
        raise DataError(f"{spec}: cannot be listed: {_one_line(error)}") from error
    readable = sorted((file for file in files if _ending(file)), key=_natural_key)
    if not readable:
        raise DataError(f"{spec}: nothing readable: no {', '.join(_READERS)} file in it")
    for file in readable:
        if not _is_encodable(file):
            raise DataError(f"{spec}: the name of a file must be valid UTF-8, got {file!r}")
    return readable


def _matching_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    if not _is_encodable(path):
        raise DataError(f"{path!r}: the name of a file must be valid UTF-8")
    [found] = filesystem.get_file_info([path])
    if found.type == pafs.FileType.File:
        _reader(path)
        return [path]
    if found.type != pafs.FileType.NotFound:
        return _walk(filesystem, path)
    if not any(letter in path for letter in "*?["):
        near = _suggestion(path) if isinstance(filesystem, pafs.LocalFileSystem) else ""
        raise DataError(f"{spec}: no such file or folder{near}")
    files = _match_glob(filesystem, path)
    if not files:
        raise DataError(f"{spec}: no file matches the pattern")
    return files


def _walk(filesystem: pafs.FileSystem, folder: str, *, recursive: bool = True) -> list[str]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        files = _walk_local(folder, recursive=recursive)
    else:
        found = filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive))
        files = [info.path for info in found if info.type == pafs.FileType.File]
    # As Spark and Ray do, names that begin with . or _ are not data.
    return [
        file
        for file in files
        if not any(part[0] in "._" for part in Path(file).relative_to(folder).parts)
    ]


def _walk_local(folder: str, *, recursive: bool) -> list[str]:
    """Arrow's own walk drops dead links in silence, and follows a loop of links forty times."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    visited = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        files += [os.path.join(parent, name) for name in names]
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in inner.items() if recursive and real not in visited]
        visited.update(inner.values())
    return files


def _match_glob(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    fixed = str(Path(re.split(r"[*?\[]", pattern, maxsplit=1)[0] + "x").parent)
    [found] = filesystem.get_file_info([fixed])
    if found.type != pafs.FileType.Directory:
        return []
    below = pattern[len(fixed) :].lstrip("/")
    files = _walk(filesystem, fixed, recursive="/" in below or "**" in below)
    expression = re.compile(_glob_expression(pattern))
    return [file for file in files if expression.fullmatch(file)]


def _glob_expression(pattern: str) -> str:
    """`**` crosses folders; `*`, `?` and `[!a]` do not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translated(token: str) -> str:
        if not re.fullmatch(r"\[.+\]", token):
            return pieces.get(token, re.escape(token))
        letters = token[1:-1].replace("\\", r"\\")
        return f"[^/{letters[1:]}]" if letters.startswith("!") else f"[{letters}]"

    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return "".join(map(translated, tokens))


def _natural_key(path: str) -> tuple[list[tuple[int, str]], str]:
    """The path itself settles what numbers leave open: part-1 and part-01."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path


def _suggestion(path: str) -> str:
    parent = Path(path).parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 reach Python as lone surrogates
        return False
    return True


def _ending(path: str) -> str | None:
    return next((ending for ending in _READERS if path.endswith(ending)), None)


def _reader(path: str) -> Callable[[pafs.FileSystem, FileSlice, int], Rows]:
    ending = _ending(path)
    if ending is None:
        raise DataError(f"{path}: file name must end in {', '.join(_READERS)}")
    return _READERS[ending]


def _dataset_of(path: str) -> str:
    """The file's name without its ending."""
    return Path(path).name.removesuffix(_ending(path) or "")


def _read_jsonl(filesystem: pafs.FileSystem, part: FileSlice, max_row_bytes: int) -> Rows:
    dataset = _dataset_of(part.path)
    lines = _translated(
        _lines_of(filesystem, part, max_row_bytes), f"{part.path}: cannot be read to its end"
    )
    for number, (line, size) in enumerate(lines, start=part.first_row):
        place = RowPlace(part.path, number, dataset)
        if size > max_row_bytes:
            yield _too_large(place, size, max_row_bytes)
        elif line.strip():
            yield _parse_line(line, place)


def _lines_of(
    filesystem: pafs.FileSystem, part: FileSlice, limit: int
) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes) for the lines that begin in `part`."""
    # From the byte before: where that ends a line, the next one begins in the slice.
    begin = max(part.start - 1, 0)
    for line, size in _lines(_chunks(filesystem, part.path, begin), limit):
        if part.stop is not None and begin >= part.stop:
            return
        if begin >= part.start:
            yield line, size
        begin += size + 1


def _lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes); never holds more of a line than `limit` and a chunk.

    Of a line over the limit only the beginning is yielded.
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
    # Buffered, since gzip reads a few kilobytes at a time, each of them a request to a store.
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


def _parse_line(line: bytes, place: RowPlace) -> Sample | RejectedRow:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        return place.reject("invalid_utf8", f"line {place.row} is not valid UTF-8: {error}")
    except json.JSONDecodeError as error:
        detail = f"line {place.row} is not valid JSON: {error.msg}, at column {error.colno}"
        return place.reject("invalid_json", detail)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 lists nested
        return place.reject("invalid_json", f"line {place.row} is not readable JSON: {error}")
    return parse_row(row, place)


def _read_parquet(filesystem: pafs.FileSystem, part: FileSlice, max_row_bytes: int) -> Rows:
    path, dataset = part.path, _dataset_of(part.path)
    number = part.first_row - 1
    batches = _translated(_batches(filesystem, part), f"{path}: not a readable parquet file")
    for batch, other_columns in batches:
        for row in _batch_rows(batch):
            number += 1
            place = RowPlace(path, number, dataset)
            if isinstance(row, ValueError):
                detail = f"row {number} cannot be decoded: {_one_line(row)}"
                yield place.reject("unreadable_row", detail)
            else:
                yield _parse_object(other_columns | row, place, max_row_bytes)


def _batches(
    filesystem: pafs.FileSystem, part: FileSlice
) -> Iterator[tuple[pa.RecordBatch, dict[str, None]]]:
    """The columns that matter, and the names of the others: these may be of any type and size."""
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
    """The rows; for one that Python cannot hold (text that is not UTF-8) the reason why not."""
    try:
        return batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    except ValueError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for n in range(batch.num_rows) for row in _batch_rows(batch.slice(n, 1))]


def _parse_object(row: dict[str, Any], place: RowPlace, max_row_bytes: int) -> Sample | RejectedRow:
    outcome = parse_row(row, place)
    if isinstance(outcome, Sample):
        size = sum(len(message.content.encode()) for message in outcome.messages)
        if size > max_row_bytes:
            place = replace(place, dataset=outcome.dataset)
            return _too_large(place, size, max_row_bytes, sample_id=outcome.sample_id)
    return outcome


def _too_large(
    place: RowPlace, size: int, max_row_bytes: int, *, sample_id: str = ""
) -> RejectedRow:
    detail = f"a row must have at most {max_row_bytes:,} bytes, got {size:,}"
    return place.reject("row_too_large", detail, sample_id=sample_id)


def _read_hub(spec: str, max_row_bytes: int) -> Rows:
    name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise DataError(f"{spec}: must be hub:NAME or hub:NAME:SPLIT")
    rows = _translated(_hub_rows(name, split or "train"), f"{spec}: cannot be had from the hub")
    number = 0
    for number, row in enumerate(rows, start=1):
        yield _parse_object(row, RowPlace(spec, number, Path(name).name), max_row_bytes)
    if not number:
        raise DataError(f"{spec}: no rows: the split is empty")


def _hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"hub:{name}: needs the package `datasets`: pip install 'selectmoe[hub]'"
        ) from error
    yield from datasets.load_dataset(name, split=split, streaming=True)


_READERS: dict[str, Callable[[pafs.FileSystem, FileSlice, int], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
