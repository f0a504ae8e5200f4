"""Corpora split into parts of about the same size, which processes can read in parallel.

A part is several files, or a slice of a large one: lines of a .jsonl file, row groups of a
.parquet file. A .jsonl.gz file and a split on the hub can only be read from the beginning, and are
one part each. The rows and their row numbers are those of `read_corpora`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.corpus.map_items import MapItems
from selectmoe.data.formats import FileSlice
from selectmoe.data.readers import HUB_PREFIX, read_corpus, read_slices
from selectmoe.data.sources import list_files, locate
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

# A part of 64 MB takes seconds; more than a thousand parts would create too many bucket files.
MIN_PART_BYTES = 64 << 20
MAX_PARTS = 1_024
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, a slice of one, or a whole corpus."""

    spec: str  # of the corpus, as `read_corpus` takes it
    slice: FileSlice | None  # None: all of the corpus


CorpusPart = tuple[Piece, ...]
"""What one process reads, piece after piece."""


def split_corpora(
    specs: Sequence[str],
    *,
    map_items: MapItems = map,
    min_part_bytes: int = MIN_PART_BYTES,
    max_parts: int = MAX_PARTS,
) -> list[CorpusPart]:
    """Parts whose rows, in order, are those of `read_corpora(specs)`.

    Parts are about as small as `min_part_bytes` and `max_parts` allow. There may be twice as many
    where file sizes do not add up well, and more where parquet files compress their rows.
    Raises DataError, as `read_corpora` would, where a corpus has no file.
    """
    files = [_files_with_sizes(spec) for spec in specs]
    num_bytes = sum(size for _, with_sizes in files for _, size in with_sizes)
    part_bytes = max(min_part_bytes, -(-num_bytes // max_parts))
    parts: list[CorpusPart] = []
    pieces: list[Piece] = []
    held = 0
    for spec, (filesystem, with_sizes) in zip(specs, files, strict=True):
        for piece, weight in _pieces_of(spec, filesystem, with_sizes, part_bytes):
            if pieces and held + weight > part_bytes:
                parts.append(tuple(pieces))
                pieces, held = [], 0
            pieces.append(piece)
            held += weight
    parts.append(tuple(pieces))
    return _with_row_numbers(parts, map_items)


def read_part(part: CorpusPart) -> Iterator[tuple[str, Sample | RejectedRow]]:
    """The rows of a part, as `read_corpus` yields them, each with the spec of its corpus."""
    for spec, pieces in itertools.groupby(part, key=lambda piece: piece.spec):
        slices = [piece.slice for piece in pieces]
        of_files = [piece for piece in slices if piece is not None]
        rows = read_slices(locate(spec)[0], of_files) if of_files else read_corpus(spec)
        yield from ((spec, row) for row in rows)


def _files_with_sizes(spec: str) -> tuple[pafs.FileSystem | None, list[tuple[str, int]]]:
    if spec.startswith(HUB_PREFIX):
        return None, []
    filesystem, path = locate(spec)
    files = list_files(filesystem, path, spec)
    return filesystem, [(info.path, info.size or 0) for info in filesystem.get_file_info(files)]


def _pieces_of(
    spec: str,
    filesystem: pafs.FileSystem | None,
    files: Iterable[tuple[str, int]],
    part_bytes: int,
) -> Iterator[tuple[Piece, int]]:
    """Pieces and their sizes; a slice of a large file counts as a full part."""
    if filesystem is None:
        yield Piece(spec, None), part_bytes
        return
    for path, size in files:
        for piece in _slices_of(filesystem, path, size, part_bytes):
            yield Piece(spec, piece), size if piece == FileSlice(path) else part_bytes


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
    """No slice for a file that cannot be read: the reader reports the reason."""
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


def _with_row_numbers(parts: Sequence[CorpusPart], map_items: MapItems) -> list[CorpusPart]:
    """Sets the first row number of each slice of a .jsonl file, by counting the lines before it."""
    pieces_to_count = [piece for part in parts for piece in part if _has_successor(piece)]
    counts = map_items(count_lines, pieces_to_count)
    counted = dict(zip(pieces_to_count, counts, strict=True))
    numbered = []
    next_row = 1
    for part in parts:
        pieces = []
        for piece in part:
            if piece.slice is not None and piece.slice.path.endswith(".jsonl"):
                next_row = next_row if piece.slice.start else 1
                pieces.append(replace(piece, slice=replace(piece.slice, first_row=next_row)))
                next_row += counted.get(piece, 0)
            else:
                pieces.append(piece)
        numbered.append(tuple(pieces))
    return numbered


def _has_successor(piece: Piece) -> bool:
    """True for a slice of a .jsonl file that another slice follows."""
    lines = piece.slice
    return lines is not None and lines.path.endswith(".jsonl") and lines.stop is not None


def count_lines(piece: Piece) -> int:
    """The number of lines that begin in a slice that has an end, blank ones included."""
    lines = piece.slice
    assert lines is not None
    assert lines.stop is not None
    # A line begins after every line feed, and at the beginning of the file.
    position = max(lines.start - 1, 0)
    count = 0 if lines.start else 1
    try:
        with locate(piece.spec)[0].open_input_file(lines.path) as file:
            file.seek(position)
            while chunk := file.read(min(_CHUNK_BYTES, lines.stop - 1 - position)):
                count += chunk.count(b"\n")
                position += len(chunk)
    except OSError as error:
        raise DataError(f"{lines.path}: cannot be read to its end: {error}") from error
    return count
