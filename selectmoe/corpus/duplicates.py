"""Exact duplicates of a corpus: rows with the same text, found without holding the text.

While rows are read, 32 bytes of each are written: a hash of its text and its row key. Ranges of
these hashes, each a task, give the keys of all rows but the first by key of each text. The order of
files, of parts and of tasks plays no role.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Shape letters: R = rows, D = duplicates.

HASH_BYTES = 16  # of a text, and of a row key
ROWS_PER_RUN = 1 << 20  # 32 MB in memory
ROWS_PER_RANGE = 1 << 22  # 128 MB in a task's memory, and as much again to sort
NUM_BYTE_VALUES = 256
_RECORD = np.dtype((">u8", 4))  # two numbers of the text's hash, two of the key


@dataclass(frozen=True, slots=True)
class TextHashes:
    """The hashes of one part of a corpus, in runs that are sorted by the hash of the text."""

    file: Path
    # For each run the record with which each first byte of a hash begins, and the run's end.
    runs: tuple[tuple[int, ...], ...]

    @property
    def num_rows(self) -> int:
        return self.runs[-1][-1] if self.runs else 0

    def read(self, first_bytes: range) -> Iterator[np.ndarray]:
        """The records, uint64 (R, 4), whose text's hash begins with one of these bytes."""
        if not self.runs:
            return
        with self.file.open("rb") as file:
            for edges in self.runs:
                start, stop = edges[first_bytes.start], edges[first_bytes.stop]
                file.seek(start * _RECORD.itemsize)
                content = file.read((stop - start) * _RECORD.itemsize)
                yield np.frombuffer(content, _RECORD).astype(np.uint64)


class TextHashWriter:
    """Writes the hashes of one part; memory holds ROWS_PER_RUN of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.pending = bytearray()
        self.runs: list[tuple[int, ...]] = []

    def add(self, key: str, text_hash: bytes) -> None:
        """key: 32 hexadecimal digits. text_hash: HASH_BYTES bytes."""
        self.pending += text_hash
        self.pending += bytes.fromhex(key)
        if len(self.pending) >= ROWS_PER_RUN * _RECORD.itemsize:
            self._spill()

    def close(self) -> TextHashes:
        if self.pending:
            self._spill()
        return TextHashes(self.file, tuple(self.runs))

    def _spill(self) -> None:
        records = np.frombuffer(bytes(self.pending), _RECORD)
        records = records[np.argsort(records[:, 0], kind="stable")]
        before = self.runs[-1][-1] if self.runs else 0
        first_bytes = (records[:, 0].astype(np.uint64) >> np.uint64(56)).astype(np.int64)
        edges = before + np.searchsorted(first_bytes, np.arange(NUM_BYTE_VALUES + 1))
        self.runs.append(tuple(edges.tolist()))
        with self.file.open("ab") as file:
            file.write(records.tobytes())
        self.pending = bytearray()


def hash_ranges(parts: Sequence[TextHashes]) -> list[range]:
    """Ranges of the first byte of a text's hash: enough that each fits into a task's memory."""
    num_rows = sum(part.num_rows for part in parts)
    if not num_rows:
        return []
    num_ranges = min(-(-num_rows // ROWS_PER_RANGE), NUM_BYTE_VALUES)
    edges = [NUM_BYTE_VALUES * number // num_ranges for number in range(num_ranges + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def write_duplicates(first_bytes: range, *, parts: Sequence[TextHashes], folder: Path) -> Path:
    """A task: writes the keys of duplicates whose text's hash is in a range, in their order.

    A retry writes the same file.
    """
    blocks = [block for part in parts for block in part.read(first_bytes)]
    keys = duplicate_keys(np.concatenate(blocks))
    file = folder / f"duplicates-{first_bytes.start:03d}.npy"
    with file.open("wb") as target:
        np.save(target, keys)
    return file


def duplicate_keys(records_R4: np.ndarray) -> np.ndarray:
    """The keys, uint64 (D, 2) in ascending order, that are not the lowest of a text.

    Rows with the lowest key of their text are not told apart: they have the same key.
    """
    order = np.argsort(records_R4[:, 0], kind="stable")
    begins = records_R4[order, 0]
    # Most texts occur once; only the others are sorted whole.
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = begins[1:] == begins[:-1]
    repeated[:-1] |= repeated[1:].copy()
    records = records_R4[order[repeated]]
    records = records[np.lexsort(records.T[::-1])]
    is_first = np.ones(len(records), dtype=bool)
    is_first[1:] = (records[1:, :2] != records[:-1, :2]).any(axis=1)
    lowest = records[is_first, 2:][np.cumsum(is_first) - 1]
    later = records[(records[:, 2:] != lowest).any(axis=1), 2:]
    return np.unique(later, axis=0)


def keys_in_order(files: Iterable[Path], digits: str) -> Iterator[str]:
    """The keys of duplicates that begin with some hexadecimal digits, in ascending order."""
    lowest = int(digits.ljust(16, "0"), 16)
    highest = int(digits.ljust(16, "f"), 16)
    blocks = []
    for file in files:
        keys = np.load(file, mmap_mode="r") if file.stat().st_size > 128 else np.load(file)
        start = np.searchsorted(keys[:, 0], np.uint64(lowest))
        stop = np.searchsorted(keys[:, 0], np.uint64(highest), side="right")
        blocks.append(np.array(keys[start:stop]))
    keys = np.concatenate(blocks) if blocks else np.empty((0, 2), np.uint64)
    keys = keys[np.lexsort(keys.T[::-1])]
    for first, second in zip(keys[:, 0], keys[:, 1], strict=True):
        yield f"{int(first):016x}{int(second):016x}"
