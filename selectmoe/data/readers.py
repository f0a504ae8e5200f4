"""A corpus as a stream of samples: files, folders and globs of them, object stores, the hub."""

import difflib
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.data.rows import RowPlace, parse_row
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

MAX_ROW_BYTES = 10_000_000
HUB_PREFIX = "hub:"
_BATCH_ROWS = 256
Rows = Iterator[Sample | RejectedRow]


def read_corpora(specs: Sequence[str], *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of several corpora, one after the other; see `read_corpus`."""
    for spec in specs:
        yield from read_corpus(spec, max_row_bytes=max_row_bytes)


def read_corpus(spec: str, *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of `spec` as samples, and those that break the contract as RejectedRow.

    spec: a .jsonl, .jsonl.gz or .parquet file; a folder (with its subfolders) or glob of them; the
    same behind a URL (s3://, gs://, …); or hub:NAME[:split], the split being train by default.
    Files are read in natural order: part-2 before part-10.
    Raises DataError where nothing is readable, a file is broken, or the hub does not answer.
    """
    if spec.startswith(HUB_PREFIX):
        yield from _read_hub(spec)
        return
    filesystem, path = _locate(spec)
    files = _list_files(filesystem, path, spec)
    num_rows = 0
    for file in files:
        for row in _reader(file)(filesystem, file, max_row_bytes):
            num_rows += 1
            yield row
    if not num_rows:
        raise DataError(f"{spec}: no rows: every file is empty")


def _locate(spec: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in spec:
        return pafs.LocalFileSystem(), str(Path(spec).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(spec)
        return filesystem, path
    except pa.ArrowInvalid:
        pass  # no scheme of Arrow's own; fsspec knows more
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(spec)
    except (ValueError, ImportError) as error:
        raise DataError(f"{spec}: cannot be reached: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _list_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    try:
        if any(letter in path for letter in "*?["):
            files = _match_glob(filesystem, path)
            if not files:
                raise DataError(f"{spec}: no file matches the pattern")
        else:
            [found] = filesystem.get_file_info([path])
            if found.type == pafs.FileType.NotFound:
                raise DataError(f"{spec}: no such file or folder{_suggestion(path)}")
            if found.type == pafs.FileType.File:
                _reader(path)
                return [path]
            files = _walk(filesystem, path)
    except OSError as error:
        raise DataError(f"{spec}: cannot be listed: {error}") from error
    readable = sorted((file for file in files if _ending(file)), key=_natural_key)
    if not readable:
        raise DataError(f"{spec}: nothing readable: no {', '.join(_READERS)} file in it")
    return readable


def _walk(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    found = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    files = [info.path for info in found if info.type == pafs.FileType.File]
    # As Spark and Ray do, names that begin with . or _ are not data.
    return [
        file
        for file in files
        if not any(part[0] in "._" for part in Path(file).relative_to(folder).parts)
    ]


def _match_glob(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    fixed = Path(re.split(r"[*?\[]", pattern, maxsplit=1)[0] + "x").parent
    files = [str(fixed / file) for file in _walk(filesystem, str(fixed))]
    expression = re.compile(_glob_expression(pattern))
    return [file for file in files if expression.fullmatch(file)]


def _glob_expression(pattern: str) -> str:
    """`**` crosses folders, `*` and `?` do not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    return "".join(
        pieces.get(token, token if token.startswith("[") else re.escape(token)) for token in tokens
    )


def _natural_key(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _suggestion(path: str) -> str:
    parent = Path(path).parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _ending(path: str) -> str | None:
    return next((ending for ending in _READERS if path.endswith(ending)), None)


def _reader(path: str) -> Callable[[pafs.FileSystem, str, int], Rows]:
    ending = _ending(path)
    if ending is None:
        raise DataError(f"{path}: file name must end in {', '.join(_READERS)}")
    return _READERS[ending]


def _dataset_of(path: str) -> str:
    """The file's name without its ending."""
    return Path(path).name.removesuffix(_ending(path) or "")


def _read_jsonl(filesystem: pafs.FileSystem, path: str, max_row_bytes: int) -> Rows:
    try:
        with filesystem.open_input_file(path) as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            yield from _jsonl_rows(_Lines(stream, max_row_bytes), path, max_row_bytes)
    except (OSError, EOFError) as error:  # BadGzipFile is an OSError, a cut one an EOFError
        raise DataError(f"{path}: cannot be read to its end: {error}") from error


class _Lines:
    """Lines of a byte stream, without ever holding more of one than `limit` + 1 MiB."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.stream = stream
        self.limit = limit

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Yields (line, its size in bytes); of a line over the limit only the beginning."""
        rest, size = b"", 0
        while chunk := self.stream.read(1 << 20):
            *lines, last = chunk.split(b"\n")
            for line in lines:
                yield rest + line, size + len(line)
                rest, size = b"", 0
            size += len(last)
            rest = rest + last if size <= self.limit else (rest + last)[:100]
        if size:
            yield rest, size


def _jsonl_rows(lines: _Lines, path: str, max_row_bytes: int) -> Rows:
    dataset = _dataset_of(path)
    for number, (line, size) in enumerate(lines, start=1):
        place = RowPlace(path, number, dataset)
        if size > max_row_bytes:
            yield place.reject(
                "row_too_large", f"a row must have at most {max_row_bytes:,} bytes, got {size:,}"
            )
        elif line.strip():
            yield _parse_line(line, place)


def _parse_line(line: bytes, place: RowPlace) -> Sample | RejectedRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        return place.reject("invalid_json", f"line {place.row} is not valid JSON: {error}")
    return parse_row(row, place)


def _read_parquet(filesystem: pafs.FileSystem, path: str, max_row_bytes: int) -> Rows:
    dataset = _dataset_of(path)
    number = 0
    try:
        with filesystem.open_input_file(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield _parse_object(row, RowPlace(path, number, dataset), max_row_bytes)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable parquet file: {reason}") from error


def _parse_object(row: dict[str, Any], place: RowPlace, max_row_bytes: int) -> Sample | RejectedRow:
    outcome = parse_row(row, place)
    if isinstance(outcome, Sample):
        size = sum(len(message.content.encode()) for message in outcome.messages)
        if size > max_row_bytes:
            detail = f"a row must have at most {max_row_bytes:,} bytes, got {size:,}"
            return place.reject("row_too_large", detail, sample_id=outcome.sample_id)
    return outcome


def _read_hub(spec: str) -> Rows:
    name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    split = split or "train"
    import datasets

    try:
        rows = iter(datasets.load_dataset(name, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub's client raises a dozen kinds, httpx's among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{spec}: cannot be had from the hub: {reason}") from error
    if first is None:
        raise DataError(f"{spec}: no rows: the split is empty")
    dataset = name.rpartition("/")[2]
    yield parse_row(first, RowPlace(spec, 1, dataset))
    for number, row in enumerate(rows, start=2):
        yield parse_row(row, RowPlace(spec, number, dataset))


_READERS: dict[str, Callable[[pafs.FileSystem, str, int], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
