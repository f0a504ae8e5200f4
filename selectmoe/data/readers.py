"""Reads a corpus as a stream of samples: files, folders, globs, object stores, the hub."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from selectmoe.data.formats import FileSlice, Rows, parse_object, read_slice, translate_errors
from selectmoe.data.rows import RowLocation
from selectmoe.data.sources import list_files, locate
from selectmoe.errors import DataError

MAX_ROW_BYTES = 10_000_000
HUB_PREFIX = "hub:"


def read_corpora(specs: Sequence[str], *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of several corpora, one after the other; see `read_corpus`."""
    for spec in specs:
        yield from read_corpus(spec, max_row_bytes=max_row_bytes)


def read_corpus(spec: str, *, max_row_bytes: int = MAX_ROW_BYTES) -> Rows:
    """The rows of `spec` as samples, and those that break the contract as RejectedRow.

    spec: a .jsonl, .jsonl.gz or .parquet file; a folder (with its subfolders) or glob of them; the
    same behind a URL (s3://, gs://, …); or hub:NAME[:split], by default the split train.
    Files are read in natural order: part-2 before part-10. In a folder, other files and names that
    begin with . or _ are skipped. A blank line of a .jsonl file is skipped, but counts as a row
    number.
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
    """The rows of `slices`, one after the other, as `read_corpus` reads whole files."""
    for part in slices:
        yield from read_slice(filesystem, part, max_row_bytes)


def require_readable(specs: Sequence[str]) -> None:
    """Raises DataError, as `read_corpus` does, for a corpus without a file; reads no file."""
    for spec in specs:
        if not spec.startswith(HUB_PREFIX):
            list_files(*locate(spec), spec)
        else:
            _require_datasets(spec)


def _read_hub(spec: str, max_row_bytes: int) -> Rows:
    name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise DataError(f"{spec}: must be hub:NAME or hub:NAME:SPLIT")
    _require_datasets(spec)
    complaint = f"{spec}: could not be downloaded from the hub"
    rows = translate_errors(_hub_rows(name, split or "train"), complaint)
    number = 0
    for number, row in enumerate(rows, start=1):
        yield parse_object(row, RowLocation(spec, number, Path(name).name), max_row_bytes)
    if not number:
        raise DataError(f"{spec}: no rows: the split is empty")


def _require_datasets(spec: str) -> None:
    if find_spec("datasets") is None:
        raise DataError(f"{spec}: needs the package `datasets`: pip install 'selectmoe[hub]'")


def _hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    yield from datasets.load_dataset(name, split=split, streaming=True)
