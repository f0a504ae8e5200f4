"""Keyed samples in buckets on disk: a sort whose memory does not grow with the corpus."""

import itertools
import operator
import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from selectmoe.records import Sample

MAX_ROWS_IN_MEMORY = 20_000
MAX_CHARACTERS = 1 << 27
KEY_DIGITS = 32
KeyedSample = tuple[str, Sample]
_KEY = operator.itemgetter(0)


class BucketWriter:
    """Puts samples into a file by two hexadecimal digits of their keys.

    It holds `max_rows_in_memory` rows, or MAX_CHARACTERS of text if these are fewer.
    """

    def __init__(self, directory: Path, *, max_rows_in_memory: int, first_digit: int = 0) -> None:
        self.directory = directory
        self.max_rows_in_memory = max_rows_in_memory
        self.digits = slice(first_digit, first_digit + 2)
        self.in_memory: list[KeyedSample] = []
        # Of the room for rows and text: what memory holds, and each bucket on disk.
        self.share_in_memory = 0.0
        self.shares: defaultdict[str, float] = defaultdict(float)

    def add(self, keyed: KeyedSample) -> None:
        self.in_memory.append(keyed)
        self.share_in_memory += self._share(keyed)
        if self.share_in_memory >= 1:
            self._spill()

    def close(self) -> dict[str, float]:
        """The buckets, each with its share of the room in memory."""
        self._spill()
        return dict(self.shares)

    def _share(self, keyed: KeyedSample) -> float:
        return 1 / self.max_rows_in_memory + num_characters(keyed[1]) / MAX_CHARACTERS

    def _spill(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.in_memory.sort(key=_KEY)
        for bucket, group in itertools.groupby(self.in_memory, lambda keyed: keyed[0][self.digits]):
            rows = list(group)
            self.shares[bucket] += sum(map(self._share, rows))
            with _file(self.directory, bucket).open("ab") as file:
                pickle.dump(rows, file)
        self.in_memory, self.share_in_memory = [], 0.0


def rows_in_order(
    directories: Sequence[Path],
    shares: Mapping[str, float],
    *,
    scratch: Path,
    max_rows_in_memory: int,
    first_digit: int = 0,
) -> Iterator[KeyedSample]:
    """Every sample of some buckets by its key, once; those of one key in the order of
    `directories`, which BucketWriters filled, and in which they were added.

    shares: of the room in memory, what each bucket has in all `directories` together. One that is
    too large (of a large corpus, or because every row has the same id) is cut again, by the next
    two digits, in `scratch`.
    """
    for bucket in sorted(shares):
        rows = _read(directories, bucket)
        if shares[bucket] <= 1:
            yield from sorted(rows, key=_KEY)
        elif first_digit + 2 == KEY_DIGITS:
            yield from rows  # all of one key
        else:
            inner = BucketWriter(
                scratch / bucket,
                max_rows_in_memory=max_rows_in_memory,
                first_digit=first_digit + 2,
            )
            for keyed in rows:
                inner.add(keyed)
            yield from rows_in_order(
                [inner.directory],
                inner.close(),
                scratch=inner.directory,
                max_rows_in_memory=max_rows_in_memory,
                first_digit=first_digit + 2,
            )
            shutil.rmtree(inner.directory)


def num_characters(sample: Sample) -> int:
    return sum(len(message.content) for message in sample.messages)


def _read(directories: Iterable[Path], bucket: str) -> Iterator[KeyedSample]:
    for directory in directories:
        path = _file(directory, bucket)
        if not path.exists():
            continue
        # Our own file of a moment ago, never one that a user gives.
        with path.open("rb") as file:
            while file.peek(1):
                yield from pickle.load(file)


def _file(directory: Path, bucket: str) -> Path:
    return directory / f"{bucket}.pickle"
