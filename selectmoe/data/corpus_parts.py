"""Corpora cut into parts of about the same size, which processes can read side by side.

A part is some files, or a piece of one that is large: lines of a .jsonl file, row groups of a
.parquet file. A .jsonl.gz file and a split of the hub can only be read from their beginning, and
are a part each. The rows, and the numbers they have in their files, are those of `read_corpora`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.data.readers import (
    HUB_PREFIX,
    FileSlice,
    Rows,
    list_files,
    locate,
    read_corpus,
    read_slices,
)
from selectmoe.errors import DataError

# A part of 64 MB is read in seconds; more than a thousand parts would mean too many bucket files.
MIN_PART_BYTES = 64 << 20
MAX_PARTS = 1_024
_CHUNK_BYTES = 8 << 20
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class TaskMap(Protocol):
    """Calls a function on every item, on some process, and gives the answers in their order."""

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item], /
    ) -> Iterable[Answer]: ...


@dataclass(frozen=True, slots=True)
class CorpusPart:
    """What one process reads."""

    spec: str  # the corpus, as `read_corpus` takes it
    slices: tuple[FileSlice, ...] | None  # None: the whole corpus


def split_corpora(
    specs: Sequence[str],
    *,
    run_tasks: TaskMap = map,
    min_part_bytes: int = MIN_PART_BYTES,
    max_parts: int = MAX_PARTS,
) -> list[CorpusPart]:
    """Parts whose rows, one after the other, are those of `read_corpora(specs)`.

    Parts are as small as `min_part_bytes` and `max_parts` allow; the latter may be exceeded by
    one for each of `specs`.
    Raises DataError, as `read_corpora` would, where a corpus has no file.
    """
    files = {spec: _files_with_sizes(spec) for spec in specs}
    num_bytes = sum(size for found in files.values() for _, size in found)
    part_bytes = max(min_part_bytes, -(-num_bytes // max_parts))
    parts = [
        part
        for spec in specs
        for part in (
            [CorpusPart(spec, None)]
            if spec.startswith(HUB_PREFIX)
            else _parts_of(spec, files[spec], part_bytes)
        )
    ]
    return _with_row_numbers(parts, run_tasks)


def read_part(part: CorpusPart) -> Rows:
    """Its rows, as `read_corpus` gives them."""
    if part.slices is None:
        return read_corpus(part.spec)
    return read_slices(locate(part.spec)[0], part.slices)


def _files_with_sizes(spec: str) -> list[tuple[str, int]]:
    if spec.startswith(HUB_PREFIX):
        return []
    filesystem, path = locate(spec)
    files = list_files(filesystem, path, spec)
    return [(info.path, info.size or 0) for info in filesystem.get_file_info(files)]


def _parts_of(spec: str, files: Iterable[tuple[str, int]], part_bytes: int) -> Iterator[CorpusPart]:
    filesystem, _ = locate(spec)
    slices: list[FileSlice] = []
    num_bytes = 0
    for path, size in files:
        for piece in _slices_of(filesystem, path, size, part_bytes):
            # A piece of a large file is a part by itself; small files come together.
            weight = size if piece == FileSlice(path) else part_bytes
            if slices and num_bytes + weight > part_bytes:
                yield CorpusPart(spec, tuple(slices))
                slices, num_bytes = [], 0
            slices.append(piece)
            num_bytes += weight
    yield CorpusPart(spec, tuple(slices))


def _slices_of(
    filesystem: pafs.FileSystem, path: str, size: int, part_bytes: int
) -> Sequence[FileSlice]:
    if size <= part_bytes:
        return [FileSlice(path)]
    if path.endswith(".jsonl"):
        edges = [*range(0, size, -(-size // -(-size // part_bytes))), None]
        return [FileSlice(path, start or 0, stop) for start, stop in itertools.pairwise(edges)]
    if path.endswith(".parquet"):
        return list(_row_group_slices(filesystem, path, part_bytes)) or [FileSlice(path)]
    return [FileSlice(path)]


def _row_group_slices(
    filesystem: pafs.FileSystem, path: str, part_bytes: int
) -> Iterator[FileSlice]:
    """None for a file that cannot be read: the reader tells why."""
    try:
        with filesystem.open_input_file(path) as file:
            metadata = pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException):
        return
    start, first_row, num_rows, num_bytes = 0, 1, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if num_bytes and num_bytes + group.total_byte_size > part_bytes:
            yield FileSlice(path, start, number, first_row)
            start, first_row, num_bytes = number, 1 + num_rows, 0
        num_rows += group.num_rows
        num_bytes += group.total_byte_size
    yield FileSlice(path, start, None, first_row)


def _with_row_numbers(parts: Sequence[CorpusPart], run_tasks: TaskMap) -> list[CorpusPart]:
    """Sets the first row of each slice of a .jsonl file, by counting the lines before it."""
    cut = [
        replace(part, slices=(piece,))
        for part in parts
        for piece in part.slices or ()
        if piece.path.endswith(".jsonl") and piece.stop is not None
    ]
    counted = iter(run_tasks(count_lines, cut))
    numbered = []
    next_row = 1
    for part in parts:
        slices = []
        for piece in part.slices or ():
            if not piece.path.endswith(".jsonl"):
                slices.append(piece)
                continue
            next_row = next_row if piece.start else 1
            slices.append(replace(piece, first_row=next_row))
            next_row += next(counted) if piece.stop is not None else 0
        numbered.append(replace(part, slices=None if part.slices is None else tuple(slices)))
    return numbered


def count_lines(part: CorpusPart) -> int:
    """How many lines begin in the one slice of `part`, which has an end; blank ones count."""
    assert part.slices is not None
    [piece] = part.slices
    assert piece.stop is not None
    # A line begins after every line feed, and at the beginning of the file.
    position = max(piece.start - 1, 0)
    count = 0 if piece.start else 1
    try:
        with locate(part.spec)[0].open_input_file(piece.path) as file:
            file.seek(position)
            while chunk := file.read(min(_CHUNK_BYTES, piece.stop - 1 - position)):
                count += chunk.count(b"\n")
                position += len(chunk)
    except OSError as error:
        raise DataError(f"{piece.path}: cannot be read to its end: {error}") from error
    return count
