"""A corpus as normalized parquet shards that do not depend on how it was split into files.

Rows are sorted by a key of two hashes, of the id and of the content, and split into shards of a
fixed size. The same rows in other files, or in another order, give the same shards, so the same
batches and bit for bit the same scores; only `source`, where a row was read, differs. The sort is a
bucket sort on disk in two steps, each of which is a list of tasks for `MapItems`: gather the parts
of the corpus into buckets, then sort ranges of keys. Memory does not grow with the corpus: a task
holds MAX_ROWS_IN_MEMORY rows, or fewer where they have MAX_CHARACTERS of text, beside a shard with
at most as much text.
"""

import contextlib
import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.config.columns import ColumnRules
from selectmoe.corpus.buckets import (
    MAX_CHARACTERS,
    BucketWriter,
    KeyedSample,
    RowBucket,
    merge_buckets,
    num_characters,
    rows_in_order,
)
from selectmoe.corpus.duplicate_filter import (
    DUPLICATES_NAME,
    DUPLICATES_SCHEMA,
    DuplicateFilter,
    DuplicateRows,
    Duplicates,
)
from selectmoe.corpus.duplicates import (
    TextHashes,
    TextHashWriter,
    hash_ranges,
    keys_in_order,
    write_duplicates,
)
from selectmoe.corpus.map_items import MapItems
from selectmoe.corpus.parts import CorpusPart, read_part, split_corpora
from selectmoe.corpus.shards import (
    SUMMARY_NAME,
    CorpusSummary,
    in_subset,
    nothing_kept,
    row_hashes,
    shard_table,
)
from selectmoe.data.listing import MAX_NAMES_IN_A_MANIFEST, Listing, list_corpora
from selectmoe.data.rejected import describe
from selectmoe.data.rows import READ_ALL
from selectmoe.data.writers import whole_file, write_json, write_parquet
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

# Tasks write the shards of one range of keys each, as long as a range has at least this many: the
# last shard of a range is not full.
SHARDS_PER_RANGE = 16
MAX_RANGE_DIGITS = 2
ROWS_BETWEEN_COUNTS = 5_000
COUNT_NAME = "rows_read"
TEXTS_NAME = "texts.bin"
REJECTED_NAME = "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [
        (field.name, pa.int64() if field.type is int else pa.string())
        for field in fields(RejectedRow)
    ]
)
KeyRange = tuple[str, Mapping[str, RowBucket]]
"""What one task of the second step sorts: the digits with which its keys begin, and its buckets."""


@dataclass(frozen=True, slots=True)
class GatheredPart:
    """Result of the first step: what was read of a part, and where its buckets are."""

    folder: Path
    num_read: int
    num_samples: int
    num_rejected: int
    num_unusable_names: int
    first_rejected: str  # "<file>:<row>: <reason>", or empty
    read_by_dataset: Counter[str]  # rows of the subset, and rejected rows
    buckets: dict[str, RowBucket]
    texts: TextHashes


@dataclass(frozen=True, slots=True)
class OrderedRange:
    """Result of the second step for one range of keys."""

    num_shards: int
    num_duplicate_ids: int
    duplicates: Counter[str]  # rows with the text of another one, by dataset


def write_corpus(  # noqa: PLR0913 (settings of a run, each with a default)
    specs: Sequence[str],
    directory: Path,
    *,
    rows_per_shard: int,
    subset_ratio: float = 1.0,
    duplicates: Duplicates = "drop",
    rules: ColumnRules = READ_ALL,
    map_items: MapItems = map,
) -> CorpusSummary:
    """Writes the rows of corpora (see `read_corpus`) as `write_shards` does.

    subset_ratio: fraction of the samples to keep, as `keep_subset` does.
    duplicates: of rows with the same text, drop keeps the first by row key alone.
    rules: how columns are read, as `read_corpus` takes it.
    map_items: calls the tasks; `directory` must be on storage that all of its workers see.
    Raises DataError where a corpus cannot be read, has no rows, or none in the subset.
    """
    with _emptied(directory) as buckets:
        gather = functools.partial(
            _gather_part, buckets=buckets, subset_ratio=subset_ratio, rules=rules
        )
        listing = list_corpora(specs)
        numbered = list(enumerate(split_corpora(listing, map_items=map_items)))
        gathered = list(map_items(gather, numbered))
        parts = [part for part, _ in gathered]
        num_read = sum((counts for _, counts in gathered), Counter[str]())
        for corpus in listing.corpora:
            if corpus.files and not num_read[corpus.spec]:
                raise DataError(f"{corpus.spec}: no rows: every file is empty")
        num_samples = sum(part.num_samples for part in parts)
        if num_samples and not any(part.buckets for part in parts):
            raise nothing_kept(num_samples, subset_ratio)
        return _write_gathered(
            parts,
            directory,
            scratch=buckets,
            order=_OrderSettings(rows_per_shard, duplicates, _about_files(listing)),
            map_items=map_items,
        )


def write_shards(
    rows: Iterable[Sample | RejectedRow],
    directory: Path,
    *,
    rows_per_shard: int,
    duplicates: Duplicates = "drop",
) -> CorpusSummary:
    """Writes shard-000000.parquet …, rejected.parquet and, last, summary.json into `directory`.

    Rows with the text of one whose key is lower are listed in duplicates.parquet, and with
    duplicates="drop" in no shard.
    The shards of a large corpus are called shard-0-000000.parquet … shard-f-…, or shard-00-… to
    shard-ff-…, after the first digits of their keys. Files that an interrupted run left in
    `directory` are removed first. Raises DataError when there is no row at all.
    """
    with _emptied(directory) as buckets:
        part = gather(rows, buckets / "part")
        if not part.num_read:
            raise DataError("the corpus has no rows")
        order = _OrderSettings(rows_per_shard, duplicates, {})
        return _write_gathered([part], directory, scratch=buckets, order=order)


def rows_read(directory: Path) -> int:
    """About how many rows the tasks of `write_corpus` have read so far."""
    num_rows = 0
    for file in directory.glob(f"buckets-*/*/{COUNT_NAME}"):
        # Removed after it was listed, or not written yet.
        with contextlib.suppress(OSError, ValueError):
            num_rows += int(file.read_text("ascii"))
    return num_rows


@contextlib.contextmanager
def _emptied(directory: Path) -> Iterator[Path]:
    """Empties the directory; yields a folder in it for buckets, which is gone afterwards."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    # Cleanup errors are ignored: where one task has failed, others may still be writing.
    with tempfile.TemporaryDirectory(
        prefix="buckets-", dir=directory, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _gather_part(
    numbered: tuple[int, CorpusPart], *, buckets: Path, subset_ratio: float, rules: ColumnRules
) -> tuple[GatheredPart, Counter[str]]:
    """The gathered part, and the number of rows that it has of each corpus."""
    number, part = numbered
    num_read: Counter[str] = Counter()

    def rows() -> Iterator[Sample | RejectedRow]:
        for spec, row in read_part(part, rules):
            num_read[spec] += 1
            yield row

    if not buckets.is_dir():
        raise DataError(
            f"{buckets.parent}: not visible to a worker; the output folder must be on storage that "
            "all nodes share"
        )
    # A unique name: a retried task may run while the first one continues on a lost node.
    folder = Path(tempfile.mkdtemp(prefix=f"part-{number:06d}-", dir=buckets))
    return gather(rows(), folder, subset_ratio=subset_ratio), num_read


def gather(
    rows: Iterable[Sample | RejectedRow], folder: Path, *, subset_ratio: float = 1.0
) -> GatheredPart:
    """Puts samples into buckets by their keys, and rejected rows into a file beside them."""
    folder.mkdir(exist_ok=True)
    read_by_dataset: Counter[str] = Counter()
    num_read = num_samples = num_unusable_names = 0
    buckets = BucketWriter(folder)
    texts = TextHashWriter(folder / TEXTS_NAME)
    with pq.ParquetWriter(folder / REJECTED_NAME, REJECTED_SCHEMA) as writer:
        rejected = _RejectedRows(writer)
        for num_read, row in enumerate(rows, start=1):
            if num_read % ROWS_BETWEEN_COUNTS == 0:
                (folder / COUNT_NAME).write_text(str(num_read), "ascii")
            if isinstance(row, RejectedRow):
                rejected.add(row)
            else:
                num_samples += 1
                key, text = row_hashes(row)
                if not in_subset(key, subset_ratio):
                    continue
                buckets.add((key, row))
                texts.add(key, text)
                num_unusable_names += row.has_unusable_name
            read_by_dataset[row.dataset] += 1
        rejected.flush()
    return GatheredPart(
        folder=folder,
        num_read=num_read,
        num_samples=num_samples,
        num_rejected=rejected.num_rows,
        num_unusable_names=num_unusable_names,
        first_rejected=rejected.first,
        read_by_dataset=read_by_dataset,
        buckets=buckets.close(),
        texts=texts.close(),
    )


@dataclass(frozen=True, slots=True)
class _OrderSettings:
    """How gathered rows become shards."""

    rows_per_shard: int
    duplicates: Duplicates
    files: dict[str, Any]  # for the summary


def _write_gathered(
    parts: Sequence[GatheredPart],
    directory: Path,
    *,
    scratch: Path,
    order: _OrderSettings,
    map_items: MapItems = map,
) -> CorpusSummary:
    read_by_dataset = sum((part.read_by_dataset for part in parts), Counter[str]())
    num_rejected = sum(part.num_rejected for part in parts)
    num_kept = read_by_dataset.total() - num_rejected
    _concatenate(REJECTED_SCHEMA, (p.folder / REJECTED_NAME for p in parts), directory)
    texts = [part.texts for part in parts]
    find = functools.partial(write_duplicates, parts=texts, folder=scratch)
    order_range = functools.partial(
        _order_range,
        directory=directory,
        scratch=scratch,
        settings=order,
        duplicate_files=list(map_items(find, hash_ranges(texts))),
    )
    ordered = list(map_items(order_range, _key_ranges(parts, num_kept, order.rows_per_shard)))
    duplicates = sum((part.duplicates for part in ordered), Counter[str]())
    if duplicates:
        files = sorted(scratch.glob(f"*{DUPLICATES_NAME}"))
        _concatenate(DUPLICATES_SCHEMA, files, directory, name=DUPLICATES_NAME)
    summary = CorpusSummary(
        num_read=read_by_dataset.total(),
        num_rejected=num_rejected,
        num_shards=sum(part.num_shards for part in ordered),
        num_duplicate_ids=sum(part.num_duplicate_ids for part in ordered),
        read_by_dataset=dict(sorted(read_by_dataset.items())),
        first_rejected=next((part.first_rejected for part in parts if part.first_rejected), ""),
        duplicates_by_dataset=dict(sorted(duplicates.items())),
        num_left_out=duplicates.total() if order.duplicates == "drop" else 0,
        files=order.files,
        num_unusable_names=sum(part.num_unusable_names for part in parts),
    )
    write_json(directory / SUMMARY_NAME, asdict(summary))
    return summary


def _about_files(listing: Listing) -> dict[str, Any]:
    passed = listing.passed_over
    kinds = {"left_over": passed.left_over, "outputs": passed.outputs, "repeated": passed.repeated}
    counts = {f"num_{kind}": len(paths) for kind, paths in kinds.items()}
    named = {kind: list(paths[:MAX_NAMES_IN_A_MANIFEST]) for kind, paths in kinds.items()}
    return {"folders": listing.folders, "num_read": listing.num_files, **counts, **named}


def _key_ranges(
    parts: Sequence[GatheredPart], num_rows: int, rows_per_shard: int
) -> list[KeyRange]:
    """Shards end where ranges do, so the ranges may depend only on the rows themselves."""
    num_digits = 0
    while (
        num_digits < MAX_RANGE_DIGITS
        and num_rows >= 16 ** (num_digits + 1) * SHARDS_PER_RANGE * rows_per_shard
    ):
        num_digits += 1
    ranges: dict[str, dict[str, RowBucket]] = {} if num_digits else {"": {}}
    for digits, bucket in merge_buckets(part.buckets for part in parts).items():
        ranges.setdefault(digits[:num_digits], {})[digits] = bucket
    return list(ranges.items())


def _order_range(
    keys: KeyRange,
    *,
    directory: Path,
    scratch: Path,
    settings: _OrderSettings,
    duplicate_files: Sequence[Path],
) -> OrderedRange:
    """Writes the shards of one range of keys. A retry writes the same files."""
    digits, buckets = keys
    num_shards = 0
    with (
        tempfile.TemporaryDirectory(prefix="split-", dir=scratch) as folder,
        DuplicateRows(scratch / f"{digits}-{DUPLICATES_NAME}") as found,
    ):
        duplicates = DuplicateFilter(
            keys_in_order(duplicate_files, digits), found, settings.duplicates
        )
        rows = duplicates.number(rows_in_order(buckets, scratch=Path(folder)))
        for chunk in _chunks(rows, settings.rows_per_shard):
            number = f"{digits}-{num_shards:06d}" if digits else f"{num_shards:06d}"
            write_parquet(directory / f"shard-{number}.parquet", shard_table(chunk))
            num_shards += 1
    return OrderedRange(num_shards, duplicates.num_duplicate_ids, found.by_dataset)


def _concatenate(
    schema: pa.Schema, files: Iterable[Path], directory: Path, *, name: str = REJECTED_NAME
) -> None:
    with whole_file(directory / name) as file, pq.ParquetWriter(file, schema) as writer:
        for path in files:
            with pq.ParquetFile(path) as part:
                for batch in part.iter_batches():
                    writer.write_batch(batch)


class _RejectedRows:
    """Writes rejected rows into one parquet file, in blocks of a thousand."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self.pending: list[dict[str, object]] = []
        self.num_rows = 0
        self.first = ""

    def add(self, row: RejectedRow) -> None:
        self.first = self.first or describe(row)
        self.pending.append(asdict(row))
        self.num_rows += 1
        if len(self.pending) == 1_000:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.pending, schema=REJECTED_SCHEMA))
        self.pending = []


def _chunks(rows: Iterable[KeyedSample], size: int) -> Iterator[list[KeyedSample]]:
    """Lists of `size` rows, or of fewer where they reach MAX_CHARACTERS of text."""
    chunk: list[KeyedSample] = []
    num_held = 0
    for keyed in rows:
        chunk.append(keyed)
        num_held += num_characters(keyed[1])
        if len(chunk) == size or num_held >= MAX_CHARACTERS:
            yield chunk
            chunk, num_held = [], 0
    if chunk:
        yield chunk
