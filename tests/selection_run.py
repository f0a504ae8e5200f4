"""Finished selection runs with given scores, written without a model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.normalize import write_shards
from selectmoe.corpus.shards import read_shard
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Message, RejectedRow, Sample
from selectmoe.scoring.calibration import Calibration, save_calibration
from selectmoe.selection.manifest import write_manifest
from selectmoe.selection.outputs import select_rows
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import SCORED_SCHEMA

SCORING = {
    "model": str(EMBEDDED_SELECTOR),
    "weights_sha256": "abc",
    "length": "adjusted",
    "num_shards": 1,
    "num_shards_reused": 0,
    "num_duplicate_ids": 0,
    "device": "cpu",
    "dtype": "float32",
    "num_tokens": 1_000,
    "seconds": 1.0,
    "tokens_per_second": 1_000.0,
}


def sample(number: int, answer: str, *, dataset: str = "corpus") -> Sample:
    messages = (Message("user", f"question {number}"), Message("assistant", answer))
    return Sample(dataset, f"row-{number}", messages, f"corpus.jsonl:{number + 1}")


def finished_run(
    root: Path,
    rows: Sequence[Sample | RejectedRow],
    scores: Sequence[float],
    *,
    config: SelectConfig | None = None,
    calibration: Calibration | None = None,
    signals: dict[str, Sequence[float]] | None = None,
) -> RunFolder:
    """A run that kept the best of the samples by their scores. Their answer tokens are their words.

    signals: further columns of scored/, by name, in the order of the samples.
    """
    config = config or SelectConfig(selection_percentage=0.2)
    root.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(root)
    write_shards(rows, folder.corpus, rows_per_shard=config.rows_per_shard)
    folder.scored.mkdir()
    samples = [row for row in rows if isinstance(row, Sample)]
    numbers = {"score": scores, **(signals or {})}
    by_id = {
        entry.sample_id: {name: values[number] for name, values in numbers.items()}
        for number, entry in enumerate(samples)
    }
    schema = pa.schema([*SCORED_SCHEMA, *(pa.field(name, pa.float32()) for name in signals or {})])
    for shard in folder.corpus_shards():
        lines = [_scored(key, entry) | by_id[entry.sample_id] for key, entry in read_shard(shard)]
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), folder.scored / shard.name)
    if calibration is not None:
        save_calibration(root, calibration)
    selected = select_rows(folder, folder, replace(config, max_rejected=1.0))
    write_manifest(config, folder, selected, SCORING, wall_seconds=1.0)
    return folder


def _scored(row_key: str, entry: Sample) -> dict[str, object]:
    num_tokens = len(entry.messages[-1].content.split())
    return {
        "row_key": row_key,
        "dataset": entry.dataset,
        "id": entry.sample_id,
        "source": entry.source,
        "num_tokens": num_tokens + 3,
        "num_answer_tokens": num_tokens,
        "truncated": False,
        "layer_scores": [0.5],
    }
