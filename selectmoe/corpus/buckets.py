"""Keyed samples in buckets on disk: a sort whose memory does not grow with the corpus."""

import itertools
import operator
import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from selectmoe.records import Sample

MAX_ROWS_IN_MEMORY = 20_000
MAX_CHARACTERS = 1 << 27
KEY_DIGITS = 32
KeyedSample = tuple[str, Sample]
_KEY = operator.itemgetter(0)


@dataclass(frozen=True, slots=True)
class RowBucket:
    """Samples whose keys agree in two digits: in each folder one file, named after the digits."""

    folders: tuple[Path, ...]
    share: float  # of what fits in memory; above 1 the bucket is sorted on disk


class BucketWriter:
    """Appends samples to a file per bucket, chosen by two hexadecimal digits of their keys.

    Memory holds at most MAX_ROWS_IN_MEMORY rows, or fewer where they have MAX_CHARACTERS of text.
    """

    def __init__(self, directory: Path, *, first_digit: int = 0) -> None:
        self.directory = directory
        self.digits = slice(first_digit, first_digit + 2)
        self.in_memory: list[KeyedSample] = []
        # Shares of what fits in memory: of the rows held now, and of each bucket on disk.
        self.share_in_memory = 0.0
        self.shares: defaultdict[str, float] = defaultdict(float)

    def add(self, keyed: KeyedSample) -> None:
        self.in_memory.append(keyed)
        self.share_in_memory += self._share(keyed)
        if self.share_in_memory >= 1:
            self._spill()

    def close(self) -> dict[str, RowBucket]:
        """The buckets by their digits."""
        self._spill()
        return {
            digits: RowBucket((self.directory,), share) for digits, share in self.shares.items()
        }

    def _share(self, keyed: KeyedSample) -> float:
        return 1 / MAX_ROWS_IN_MEMORY + num_characters(keyed[1]) / MAX_CHARACTERS

    def _spill(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.in_memory.sort(key=_KEY)
        for digits, group in itertools.groupby(self.in_memory, lambda keyed: keyed[0][self.digits]):
            rows = list(group)
            self.shares[digits] += sum(map(self._share, rows))
            with _file(self.directory, digits).open("ab") as file:
                pickle.dump(rows, file)
        self.in_memory, self.share_in_memory = [], 0.0


def merge_buckets(parts: Iterable[Mapping[str, RowBucket]]) -> dict[str, RowBucket]:
    """The buckets of several writers, merged by their digits and in the order of these."""
    by_digits: defaultdict[str, list[RowBucket]] = defaultdict(list)
    for part in parts:
        for digits, bucket in part.items():
            by_digits[digits].append(bucket)
    return {
        digits: RowBucket(
            tuple(folder for bucket in buckets for folder in bucket.folders),
            sum(bucket.share for bucket in buckets),
        )
        for digits, buckets in sorted(by_digits.items())
    }


def rows_in_order(
    buckets: Mapping[str, RowBucket], *, scratch: Path, first_digit: int = 0
) -> Iterator[KeyedSample]:
    """Every sample of some buckets, once, sorted by its key. The sort is stable: samples with one
    key keep the order of the folders and, within a folder, the order in which they were added.

    A bucket that does not fit in memory (of a large corpus, or because every row has the same id)
    is split again, by the next two digits, in `scratch`.
    """
    for digits in sorted(buckets):
        rows = _read(_file(folder, digits) for folder in buckets[digits].folders)
        if buckets[digits].share <= 1:
            yield from _ties_in_order(sorted(rows, key=_KEY))
        elif first_digit + 2 == KEY_DIGITS:
            yield from rows  # all have one key
        else:
            inner = BucketWriter(scratch / digits, first_digit=first_digit + 2)
            for keyed in rows:
                inner.add(keyed)
            yield from rows_in_order(
                inner.close(), scratch=inner.directory, first_digit=first_digit + 2
            )
            shutil.rmtree(inner.directory)


def num_characters(sample: Sample) -> int:
    return len(sample.extra_columns) + sum(map(len, sample.texts()))


def _ties_in_order(rows: list[KeyedSample]) -> list[KeyedSample]:
    """Orders rows with one key by what is no part of it, not by the file where they were read."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end][0] != rows[start][0]:
            if end - start > 1:
                rows[start:end] = sorted(rows[start:end], key=_columns)
            start = end
    return rows


def _columns(keyed: KeyedSample) -> tuple[str, ...]:
    _, sample = keyed
    return sample.extra_columns, *(message.fields for message in sample.messages)


def _read(files: Iterable[Path]) -> Iterator[KeyedSample]:
    for path in files:
        # Safe to unpickle: the job itself has just written the file.
        with path.open("rb") as file:
            while file.peek(1):
                yield from pickle.load(file)


def _file(folder: Path, digits: str) -> Path:
    return folder / f"{digits}.pickle"
