"""The folder of a selection run, and its scored shards.

corpus/shard-000000.parquet   normalised rows, in the order of their keys
corpus/rejected.parquet       rows that broke the input contract
corpus/summary.json           written last: the corpus is whole
scored/shard-000000.parquet   scores of the corpus shard of the same name
scored/_finished.jsonl         one line for every shard that was scored, never rewritten
calibration.json               of the weights, as it was when the run began; if they had one
selected_data.jsonl  rejected/rejected.jsonl  manifest.json
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from selectmoe.corpus.shards import read_shard
from selectmoe.data.writers import write_parquet
from selectmoe.records import Sample, ScoredSample, UnscoredSample

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


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where each file of a selection run lies."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def scored(self) -> Path:
        return self.root / "scored"

    def corpus_shards(self) -> list[Path]:
        return sorted(self.corpus.glob("shard-*.parquet"))

    def scored_shards(self) -> list[Path]:
        return sorted(self.scored.glob("shard-*.parquet"))

    def unscored_shards(self) -> list[Path]:
        """Corpus shards that have no scores yet: what is left to do after an interruption."""
        done = {path.name for path in self.scored_shards()}
        return [path for path in self.corpus_shards() if path.name not in done]


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What scoring one shard took; a line of `_finished.jsonl`."""

    shard: str
    num_rows: int
    num_tokens: int
    num_truncated: int
    num_unscored: int
    seconds: float


class Scorer(Protocol):
    """What scores a shard: a ScoringEngine, or something that asks one elsewhere."""

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """One answer a sample, in the order given."""
        ...


def score_shard(scorer: Scorer, shard: Path, scored: Path) -> ShardCounts:
    """Scores one corpus shard into `scored`, whole or not at all, and notes it as finished."""
    started = time.perf_counter()
    rows = read_shard(shard)
    outcomes = scorer.score([sample for _, sample in rows])
    table = scored_table(rows, outcomes)
    scored.mkdir(parents=True, exist_ok=True)
    write_parquet(scored / shard.name, table)
    counts = ShardCounts(
        shard=shard.name,
        num_rows=table.num_rows,
        num_tokens=sum(o.num_tokens for o in outcomes if isinstance(o, ScoredSample)),
        num_truncated=sum(o.truncated for o in outcomes if isinstance(o, ScoredSample)),
        num_unscored=sum(isinstance(o, UnscoredSample) for o in outcomes),
        seconds=round(time.perf_counter() - started, 3),
    )
    line = json.dumps({**asdict(counts), "process_id": os.getpid()}) + "\n"
    # By its name no data set: readers of the folder pass over what begins with an underscore.
    # One write in append mode: lines of actors that finish together do not mix.
    descriptor = os.open(scored / "_finished.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
    return counts


def scored_table(
    rows: Sequence[tuple[str, Sample]], outcomes: Sequence[ScoredSample | UnscoredSample]
) -> pa.Table:
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
