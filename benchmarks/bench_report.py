"""report.html of a million scored rows: seconds, CPU seconds, memory and size of the file.

    python benchmarks/bench_report.py            # needs 200 MB of disk
    python benchmarks/bench_report.py --quick    # 20,000 rows, and no result file

A finished run is written with random scores and short texts, 512 rows a shard as the select job has
them. A process of its own then writes the report, without a model: token scores of 50 rows cost the
same for a corpus of any size. Memory is the process's peak resident size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.process_memory import read_mb  # noqa: E402
from selectmoe.config.selection import SelectConfig  # noqa: E402
from selectmoe.corpus.normalize import REJECTED_NAME  # noqa: E402
from selectmoe.corpus.shards import SHARD_SCHEMA  # noqa: E402
from selectmoe.report.selection_report import write_report  # noqa: E402
from selectmoe.selection.manifest import write_manifest  # noqa: E402
from selectmoe.selection.outputs import select_rows  # noqa: E402
from selectmoe.selection.run_folder import RunFolder  # noqa: E402
from selectmoe.selection.scored_shards import SCORED_SCHEMA  # noqa: E402

NUM_ROWS = 1_000_000
QUICK_ROWS = 20_000
ROWS_PER_SHARD = 512
NUM_DATASETS = 5
NUM_LAYERS = 16
REJECTED_COLUMNS = ("file", "row", "dataset", "sample_id", "reason", "detail")
SCORING = {"model": "random", "weights_sha256": "none", "length": "raw", "tokens_per_second": 0.0}


def write_run(folder: RunFolder, num_rows: int) -> None:
    """A finished run that kept the best 5 %."""
    folder.corpus.mkdir()
    folder.scored.mkdir()
    empty = {name: pa.array([], pa.string()) for name in REJECTED_COLUMNS}
    pq.write_table(pa.table(empty), folder.corpus / REJECTED_NAME)
    for number in range(-(-num_rows // ROWS_PER_SHARD)):
        first = number * ROWS_PER_SHARD
        name = f"shard-{number:06d}.parquet"
        corpus, scored = shard_tables(first, min(ROWS_PER_SHARD, num_rows - first), num_rows)
        pq.write_table(corpus, folder.corpus / name, compression="zstd")
        pq.write_table(scored, folder.scored / name, compression="zstd")
    config = SelectConfig()
    selected = select_rows(folder, folder, config)
    write_manifest(config, folder, selected, SCORING, wall_seconds=0.0)


def shard_tables(first: int, count: int, num_rows: int) -> tuple[pa.Table, pa.Table]:
    """Texts and scores of consecutive rows."""
    rng = np.random.default_rng(first)
    lengths = rng.lognormal(5, 1, count).astype(np.int32) + 1
    rows = range(first, first + count)
    common = {
        "row_key": [f"{row * (2**64 // num_rows):016x}{row:016x}" for row in rows],
        "dataset": [f"dataset-{row % NUM_DATASETS}" for row in rows],
        "id": [str(row) for row in rows],
        "source": [f"corpus.jsonl:{row + 1}" for row in rows],
    }
    turn = {"role": "assistant", "content": "Air scatters blue light. " * 20}
    messages = [[{"role": "user", "content": f"Question {row}?"}, turn] for row in rows]
    scores = {
        "score": rng.beta(2, 1.5, count).astype(np.float32),
        "num_tokens": lengths + 20,
        "num_answer_tokens": lengths,
        "truncated": np.zeros(count, dtype=bool),
        "layer_scores": [[0.5] * NUM_LAYERS] * count,
    }
    return (
        table_of(common | {"messages": messages}, SHARD_SCHEMA, count),
        table_of(common | scores, SCORED_SCHEMA, count),
    )


def table_of(columns: dict[str, object], schema: pa.Schema, count: int) -> pa.Table:
    """A table of the schema; columns that are not given are null."""
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(count, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def measure(run: Path) -> dict[str, object]:
    """Writes the report in this process."""
    cpu_before = time.process_time()
    written = write_report(run, open_scorer=None)
    return {
        "seconds": round(written.seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu_before, 2),
        "peak_mb": round(read_mb(os.getpid(), "VmHWM")),
        "report_kb": round(written.file.stat().st_size / 1e3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 rows; no result file")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run)))
        return
    # Imported here because it imports torch, which would add to the memory of the measured process.
    from benchmarks.results import report

    num_rows = QUICK_ROWS if args.quick else NUM_ROWS
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        write_run(RunFolder(Path(folder)), num_rows)
        child = [sys.executable, __file__, "--run", folder]
        answer = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout
    report("bench_report", {"num_rows": num_rows, **json.loads(answer)}, quick=args.quick)


if __name__ == "__main__":
    main()
