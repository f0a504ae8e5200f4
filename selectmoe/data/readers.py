"""Reads a corpus as a stream of samples: files, folders, globs, object stores, the hub."""

import logging
from collections.abc import Iterable, Sequence

import pyarrow.fs as pafs

from selectmoe.config.columns import ColumnRules
from selectmoe.data.byte_streams import read_chunks, translate_errors
from selectmoe.data.endings import BINARY, require_ending
from selectmoe.data.formats import FileSlice, Rows, read_slice
from selectmoe.data.hub import HUB_PREFIX, is_hub, read_hub, require_datasets
from selectmoe.data.listing import Corpus, Listing, list_corpora
from selectmoe.data.rows import READ_ALL
from selectmoe.errors import DataError

__all__ = ["HUB_PREFIX", "read_corpora", "read_corpus", "read_slices", "require_readable"]

MAX_ROW_BYTES = 10_000_000

logger = logging.getLogger(__name__)


def read_corpora(
    specs: Sequence[str], *, max_row_bytes: int = MAX_ROW_BYTES, rules: ColumnRules = READ_ALL
) -> Rows:
    """The rows of several corpora, one after the other; see `read_corpus`.

    A file that several of them reach is read once.
    """
    for corpus in list_corpora(specs).corpora:
        yield from _read_listed(corpus, max_row_bytes, rules)


def read_corpus(
    spec: str, *, max_row_bytes: int = MAX_ROW_BYTES, rules: ColumnRules = READ_ALL
) -> Rows:
    """The rows of `spec` as samples, and those that break the contract as RejectedRow.

    spec: a file whose name ends as `endings.py` knows it; a folder (with its subfolders) or glob of
    them; the same behind a URL (s3://, gs://, …); or hub:NAME[:CONFIG][:SPLIT][@REVISION], by
    default the split train.
    Files are read in natural order: part-2 before part-10. In a folder, other files, names that
    begin with . or _ and folders of runs are passed over. A blank line is skipped, but counts as a
    row number.
    Raises DataError where nothing is readable, a file is broken, or the hub does not answer.
    """
    yield from read_corpora([spec], max_row_bytes=max_row_bytes, rules=rules)


def read_slices(
    filesystem: pafs.FileSystem | None,
    slices: Iterable[FileSlice],
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    rules: ColumnRules = READ_ALL,
) -> Rows:
    """The rows of `slices`, one after the other. filesystem: None for datasets of the hub."""
    for part in slices:
        if filesystem is None:
            yield from read_hub(
                part.path,
                dataset=part.dataset,
                name=part.name,
                max_row_bytes=max_row_bytes,
                rules=rules,
            )
        else:
            yield from read_slice(filesystem, part, max_row_bytes, rules)


def require_readable(specs: Sequence[str]) -> Listing:
    """Raises DataError, as `read_corpus` does, for a corpus without a file, and for a single file
    that is not what its name says; reads no further.

    Tells what of the folders will not be read.
    """
    for spec in specs:
        if is_hub(spec):
            require_datasets(spec)
    listing = list_corpora(specs)
    for corpus in listing.corpora:
        _require_beginning(corpus)
    for line in listing.passed_over.lines():
        logger.info("%s", line)
    return listing


def _require_beginning(corpus: Corpus) -> None:
    """Refuses a single file that cannot be decompressed, before a run begins."""
    if corpus.filesystem is None or len(corpus.files) != 1:
        return
    [file] = corpus.files
    if require_ending(file.path).format not in BINARY:
        chunks = read_chunks(corpus.filesystem, file.path)
        next(translate_errors(chunks, f"{file.path}: cannot be read"), b"")


def _read_listed(corpus: Corpus, max_row_bytes: int, rules: ColumnRules) -> Rows:
    num_rows = 0
    rows = read_slices(corpus.filesystem, corpus.files, max_row_bytes=max_row_bytes, rules=rules)
    for row in rows:
        num_rows += 1
        yield row
    if corpus.files and not num_rows:
        raise DataError(f"{corpus.spec}: no rows: every file is empty")
