"""Reads the scores of a run one row group at a time, and other columns on demand."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selectmoe.selection.top_k import (
    HASH_HEX_LENGTH,
    WHOLE_CORPUS,
    ReadKeys,
    Rows,
    Scope,
    descending_keys,
)

# Shape letters: N = rows of a block, M = some of them.

ALL_KEYS = (0, (1 << 32) - 1)


class ScoreBlock:
    """The rows of one row group that have a score; N of them."""

    def __init__(
        self, file: pq.ParquetFile, row_group: int, first_row: int, columns: Sequence[str]
    ) -> None:
        self._file = file
        self._row_group = row_group
        self._table = self._read(columns)
        scores = self._table["score"]
        self._scored = scores.is_valid()
        self._has_nulls = scores.null_count > 0
        self._first_row = first_row
        self.scores: np.ndarray = scores.drop_null().to_numpy()  # float32 (N,)

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """int64 (N,), position in the shard, and in the corpus shard of the same name."""
        return self._first_row + np.flatnonzero(self._scored)

    def numbers(self, column: str) -> np.ndarray:
        """(N,), of a column of numbers or truth values."""
        numbers: np.ndarray = self._of_scored(self._table[column]).to_numpy()
        return numbers

    def keys_of(self, rows: Rows) -> ReadKeys:
        """Gives the row keys of some of these rows, and reads the column when it is called."""

        def read_keys(indices: np.ndarray) -> np.ndarray:
            if not len(indices):
                return np.empty(0, dtype=np.str_)
            wanted = indices if isinstance(rows, slice) else rows[indices]
            return np.array(self._row_keys.take(wanted).to_pylist(), dtype=np.str_)

        return read_keys

    def rows_by_dataset(self) -> Iterator[tuple[str, Rows]]:
        """Each dataset in the block with its rows."""
        if not len(self.scores):
            return
        column = self._of_scored(self._table["dataset"]).combine_chunks()
        names = column.dictionary.to_pylist()
        if len(names) == 1:
            yield names[0], slice(None)
            return
        codes = column.indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(names)))
        for name, rows in zip(names, np.split(order, ends[:-1]), strict=True):
            if len(rows):
                yield name, rows

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """uint64 (N, 2): the two hashes with which each row key begins."""
        # From the bytes of the column: a million Python strings would take a second.
        keys = pc.utf8_slice_codeunits(self._row_keys, 0, HASH_HEX_LENGTH).combine_chunks()
        letters = np.frombuffer(keys.buffers()[2] or b"", np.uint8)
        first = keys.offset * HASH_HEX_LENGTH
        letters = letters[first : first + len(keys) * HASH_HEX_LENGTH]
        digits = (letters & 0xF) + 9 * (letters >> 6)  # "0" is 0x30, "a" is 0x61
        pairs = (digits[0::2] << 4) | digits[1::2]
        return pairs.view(">u8").astype(np.uint64).reshape(len(keys), 2)

    @cached_property
    def _row_keys(self) -> pa.ChunkedArray:
        return self._of_scored(self._read(["row_key"])["row_key"])

    def _of_scored(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        return column.filter(self._scored) if self._has_nulls else column

    def _read(self, columns: Sequence[str]) -> pa.Table:
        # Single-threaded: a pass reads several shards at once already.
        return self._file.read_row_group(self._row_group, columns=list(columns), use_threads=False)


def score_blocks(
    shard: Path, columns: Sequence[str] = ("score",), *, key_range: tuple[int, int] = ALL_KEYS
) -> Iterator[ScoreBlock]:
    """The blocks of a scored shard that can hold a score in the range, by parquet's statistics.

    key_range: the first and the last of the `descending_keys` that are looked for.
    """
    # Dictionary-encoded: there are few names, and a million strings take a second.
    with pq.ParquetFile(shard, read_dictionary=["dataset"]) as file:
        first_row = 0
        score = file.schema.names.index("score")
        for number in range(file.num_row_groups):
            row_group = file.metadata.row_group(number)
            if _may_hold(row_group.column(score).statistics, row_group.num_rows, key_range):
                yield ScoreBlock(file, number, first_row, columns)
            first_row += row_group.num_rows


def rows_by_scope(
    block: ScoreBlock, scopes: Mapping[Scope, object]
) -> Iterator[tuple[Scope, Rows]]:
    """The rows of each scope that occurs in a block: all of them, or those of each dataset."""
    if WHOLE_CORPUS in scopes:
        yield WHOLE_CORPUS, slice(None)
        return
    yield from ((name, rows) for name, rows in block.rows_by_dataset() if name in scopes)


def scope_columns(scopes: Mapping[Scope, object]) -> tuple[str, ...]:
    """The columns that `rows_by_scope` needs beside the scores."""
    return () if WHOLE_CORPUS in scopes or not scopes else ("dataset",)


def _may_hold(statistics: pq.Statistics | None, num_rows: int, key_range: tuple[int, int]) -> bool:
    if statistics is None:
        return True
    if statistics.has_null_count and statistics.null_count == num_rows:
        return False
    if not statistics.has_min_max:
        return True
    ends = np.array([statistics.max, statistics.min], dtype=np.float32)
    first, last = descending_keys(ends).tolist()
    return bool(first <= key_range[1] and key_range[0] <= last)
