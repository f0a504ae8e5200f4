"""Scores one corpus shard at a time into a parquet file of the same name."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from selectmoe.corpus.shards import read_shard
from selectmoe.data.writers import write_parquet
from selectmoe.records import Sample, ScoredSample, UnscoredSample
from selectmoe.selection.signal_columns import with_signal_columns

# Without a data suffix and with an underscore, so that dataset readers skip it in the folder.
FINISHED_NAME = "_finished.jsonl"
SCORED_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("score", pa.float32()),  # null where the model has no number
        ("num_tokens", pa.int32()),
        ("num_answer_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("layer_scores", pa.list_(pa.float32())),
        ("source", pa.string()),
        ("reason", pa.string()),  # null where there is a score
        ("detail", pa.string()),
    ]
)


class SampleScorer(Protocol):
    """What scores a shard: a ScoringEngine, or a client of one that runs elsewhere."""

    @property
    def device_and_dtype(self) -> tuple[str, str]:
        """What computes, and in which dtype: ("cuda", "bfloat16")."""
        ...

    @property
    def signal_sizes(self) -> Mapping[str, int]:
        """How many numbers each signal of a scored row has; empty where it gives none."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """One result per sample, in the order given."""
        ...


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What scoring one shard took; a line of `_finished.jsonl`."""

    shard: str
    num_rows: int
    num_tokens: int
    num_truncated: int
    num_unscored: int
    seconds: float
    device: str
    dtype: str


def score_shard(scorer: SampleScorer, shard: Path, scored: Path) -> ShardCounts:
    """Scores one corpus shard into the folder `scored`: the file is whole or absent."""
    started = time.perf_counter()
    rows = read_shard(shard)
    outcomes = scorer.score([sample for _, sample in rows])
    table = with_signal_columns(scored_table(rows, outcomes), outcomes, scorer.signal_sizes)
    scored.mkdir(parents=True, exist_ok=True)
    write_parquet(scored / shard.name, table)
    device, dtype = scorer.device_and_dtype
    counts = ShardCounts(
        shard=shard.name,
        num_rows=table.num_rows,
        num_tokens=sum(o.num_tokens for o in outcomes if isinstance(o, ScoredSample)),
        num_truncated=sum(o.truncated for o in outcomes if isinstance(o, ScoredSample)),
        num_unscored=sum(isinstance(o, UnscoredSample) for o in outcomes),
        seconds=round(time.perf_counter() - started, 3),
        device=device,
        dtype=dtype,
    )
    _note_finished(scored / FINISHED_NAME, counts)
    return counts


def _note_finished(file: Path, counts: ShardCounts) -> None:
    line = json.dumps({**asdict(counts), "process_id": os.getpid()}) + "\n"
    # One write in append mode: lines of workers that finish at the same time do not mix.
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def devices_and_dtypes(scored: Path) -> tuple[str, str]:
    """What has computed the scores of a folder, such as ("cpu", "float32"); several are joined, as
    of a run that was resumed on another kind of node."""
    file = scored / FINISHED_NAME
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    devices, dtypes = (
        ", ".join(sorted({row[key] for row in rows if key in row})) for key in ("device", "dtype")
    )
    return devices, dtypes


def scored_table(
    rows: Sequence[tuple[str, Sample]], outcomes: Sequence[ScoredSample | UnscoredSample]
) -> pa.Table:
    """Keyed samples beside their results, as SCORED_SCHEMA has them."""
    records = []
    for (row_key, sample), outcome in zip(rows, outcomes, strict=True):
        record: dict[str, object] = {
            "row_key": row_key,
            "dataset": sample.dataset,
            "id": sample.sample_id,
            "source": sample.source,
        }
        if isinstance(outcome, ScoredSample):
            record |= {
                "score": outcome.score,
                "num_tokens": outcome.num_tokens,
                "num_answer_tokens": outcome.num_answer_tokens,
                "truncated": outcome.truncated,
                "layer_scores": outcome.layer_scores.tolist(),
            }
        else:
            record |= {"reason": outcome.reason, "detail": outcome.detail}
        records.append(record)
    return pa.Table.from_pylist(records, schema=SCORED_SCHEMA)
