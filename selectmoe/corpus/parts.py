"""Corpora split into parts of about the same size, which processes can read in parallel.

A part is several files, or a slice of a large one: lines of a .jsonl file, row groups of a
.parquet file. Other files, compressed ones and a split on the hub are read from the beginning, and
are one part each. The rows and their row numbers are those of `read_corpora`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selectmoe.config.columns import ColumnRules
from selectmoe.corpus.map_items import MapItems
from selectmoe.data.endings import require_ending
from selectmoe.data.formats import FileSlice, is_sliceable
from selectmoe.data.hub import is_hub
from selectmoe.data.listing import Corpus, Listing
from selectmoe.data.readers import read_slices
from selectmoe.data.rows import READ_ALL
from selectmoe.data.sources import locate
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

# A part of 64 MB takes seconds; more than a thousand parts would create too many bucket files.
MIN_PART_BYTES = 64 << 20
MAX_PARTS = 1_024
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, a slice of one, or a split on the hub, whose path is its spec."""

    spec: str  # of the corpus, as `read_corpus` takes it
    slice: FileSlice


CorpusPart = tuple[Piece, ...]
"""What one process reads, piece after piece."""


def split_corpora(
    listing: Listing,
    *,
    map_items: MapItems = map,
    min_part_bytes: int = MIN_PART_BYTES,
    max_parts: int = MAX_PARTS,
) -> list[CorpusPart]:
    """Parts whose rows, in order, are those of `read_corpora` for the same corpora.

    Parts are about as small as `min_part_bytes` and `max_parts` allow. There may be twice as many
    where file sizes do not add up well, and more where parquet files compress their rows.
    """
    sizes = [_file_sizes(corpus) for corpus in listing.corpora]
    part_bytes = max(min_part_bytes, -(-sum(map(sum, sizes)) // max_parts))
    parts: list[CorpusPart] = []
    pieces: list[Piece] = []
    held = 0
    for corpus, sizes_of_files in zip(listing.corpora, sizes, strict=True):
        for piece, weight in _pieces_of(corpus, sizes_of_files, part_bytes):
            if pieces and held + weight > part_bytes:
                parts.append(tuple(pieces))
                pieces, held = [], 0
            pieces.append(piece)
            held += weight
    parts.append(tuple(pieces))
    return _with_row_numbers(parts, map_items)


def read_part(
    part: CorpusPart, rules: ColumnRules = READ_ALL
) -> Iterator[tuple[str, Sample | RejectedRow]]:
    """The rows of a part, as `read_corpus` yields them, each with the spec of its corpus."""
    for spec, pieces in itertools.groupby(part, key=lambda piece: piece.spec):
        filesystem = None if is_hub(spec) else locate(spec)[0]
        rows = read_slices(filesystem, [piece.slice for piece in pieces], rules=rules)
        yield from ((spec, row) for row in rows)


def _file_sizes(corpus: Corpus) -> list[int]:
    if corpus.filesystem is None:
        return [0] * len(corpus.files)
    infos = corpus.filesystem.get_file_info([file.path for file in corpus.files])
    return [info.size or 0 for info in infos]


def _pieces_of(
    corpus: Corpus, sizes: Sequence[int], part_bytes: int
) -> Iterator[tuple[Piece, int]]:
    """Pieces and their sizes; a slice of a large file, or of the hub, counts as a full part."""
    for file, size in zip(corpus.files, sizes, strict=True):
        if corpus.filesystem is None:
            yield Piece(corpus.spec, file), part_bytes
            continue
        for piece in _slices_of(corpus.filesystem, file, size, part_bytes):
            yield Piece(corpus.spec, piece), size if piece == file else part_bytes


def _slices_of(
    filesystem: pafs.FileSystem, file: FileSlice, size: int, part_bytes: int
) -> Sequence[FileSlice]:
    if size <= part_bytes:
        return [file]
    if is_sliceable(file.path):
        edges = [*range(0, size, -(-size // -(-size // part_bytes))), None]
        pairs = itertools.pairwise(edges)
        return [replace(file, start=start or 0, stop=stop) for start, stop in pairs]
    if require_ending(file.path).format == "parquet":
        return list(_row_group_slices(filesystem, file, part_bytes)) or [file]
    return [file]


def _row_group_slices(
    filesystem: pafs.FileSystem, parquet: FileSlice, part_bytes: int
) -> Iterator[FileSlice]:
    """No slice for a file that cannot be read: the reader reports the reason."""
    try:
        with filesystem.open_input_file(parquet.path) as file:
            metadata = pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException):
        return
    start, first_row, num_rows, num_bytes = 0, 1, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if num_bytes and num_bytes + group.total_byte_size > part_bytes:
            yield replace(parquet, start=start, stop=number, first_row=first_row)
            start, first_row, num_bytes = number, 1 + num_rows, 0
        num_rows += group.num_rows
        num_bytes += group.total_byte_size
    yield replace(parquet, start=start, first_row=first_row)


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
            if _has_lines(piece):
                next_row = next_row if piece.slice.start else 1
                pieces.append(replace(piece, slice=replace(piece.slice, first_row=next_row)))
                next_row += counted.get(piece, 0)
            else:
                pieces.append(piece)
        numbered.append(tuple(pieces))
    return numbered


def _has_lines(piece: Piece) -> bool:
    return not is_hub(piece.spec) and is_sliceable(piece.slice.path)


def _has_successor(piece: Piece) -> bool:
    """True for a slice of lines that another slice follows."""
    return _has_lines(piece) and piece.slice.stop is not None


def count_lines(piece: Piece) -> int:
    """The number of lines that begin in a slice that has an end, blank ones included."""
    lines = piece.slice
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
