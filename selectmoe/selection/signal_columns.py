"""The signals of scored rows as columns of their own in `scored/*.parquet`, where they are asked
for: whoever reads the scores reads none of their bytes.

Numbers are float32, a vector is a fixed-size list of float16. A row without a score or without a
finite value has null.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.records import SampleSignals, ScoredSample, UnscoredSample

VECTOR = "vector"


def with_signal_columns(
    table: pa.Table, outcomes: Sequence[ScoredSample | UnscoredSample], sizes: Mapping[str, int]
) -> pa.Table:
    """The table with one column more for each signal.

    sizes: how many numbers each signal of a row has.
    """
    rows = [outcome.signals if isinstance(outcome, ScoredSample) else None for outcome in outcomes]
    for name, size in sizes.items():
        column = _vectors(rows, size) if name == VECTOR else _numbers(rows, name)
        table = table.append_column(name, column)
    return table


def _numbers(rows: Sequence[SampleSignals | None], name: str) -> pa.Array:
    return pa.array([row and getattr(row, name) for row in rows], pa.float32())


def _vectors(rows: Sequence[SampleSignals | None], size: int) -> pa.Array:
    values = np.zeros((len(rows), size), dtype=np.float16)
    is_missing = np.ones(len(rows), dtype=bool)
    for number, row in enumerate(rows):
        if row is not None and row.vector is not None:
            values[number], is_missing[number] = row.vector, False
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, size, mask=pa.array(is_missing))


def count_missing(shards: Iterable[Path], signals: Sequence[str]) -> dict[str, int]:
    """Of each signal, the rows that have a score and no value, by parquet's statistics."""
    missing = Counter(dict.fromkeys(signals, 0))
    for shard in shards if signals else ():
        metadata = pq.read_metadata(shard)
        for number in range(metadata.num_row_groups):
            nulls = _nulls_by_column(metadata.row_group(number))
            for name in signals:
                missing[name] += nulls[name] - nulls["score"]
    return dict(missing)


def _nulls_by_column(row_group: pq.RowGroupMetaData) -> dict[str, int]:
    """The first name of a column's path is that of the column; a missing list is one null."""
    columns = (row_group.column(number) for number in range(row_group.num_columns))
    return {
        column.path_in_schema.partition(".")[0]: column.statistics.null_count
        for column in columns
        if column.statistics is not None
    }
