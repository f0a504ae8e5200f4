"""CPU time of each part of a selection except the model.

    python benchmarks/bench_stages.py --data ../shared/data/instructions/dolly.jsonl

CPU seconds, not wall time, in one thread: docs/operations.md extrapolates from them. The passes of
the top-k selection over scores are in bench_topk.py; here is only their cost of opening a shard.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Set before any library creates its thread pool.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import one_line_errors, report  # noqa: E402
from selectmoe.corpus.normalize import write_corpus  # noqa: E402
from selectmoe.corpus.shards import CorpusSummary, read_shard  # noqa: E402
from selectmoe.data.writers import write_parquet  # noqa: E402
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR  # noqa: E402
from selectmoe.records import Sample, ScoredSample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402
from selectmoe.selection.keep_rule import ThresholdRule  # noqa: E402
from selectmoe.selection.orders import ByScore  # noqa: E402
from selectmoe.selection.outputs import write_piece  # noqa: E402
from selectmoe.selection.passes import survey  # noqa: E402
from selectmoe.selection.run_folder import RunFolder  # noqa: E402
from selectmoe.selection.scored_shards import scored_table  # noqa: E402
from selectmoe.selection.top_k import WHOLE_CORPUS, Threshold  # noqa: E402

NUM_LAYERS = 16  # as in OLMoE-1B-7B: every row has a score per layer
PERCENTAGE = 0.05
# Scores are uniform in [0, 1); "g" sorts after every row key, which is hexadecimal.
BEST = ThresholdRule(
    ByScore(), {WHOLE_CORPUS: Threshold(score=1 - PERCENTAGE, row_key="g", num_kept=0)}
)


class Stopwatch:
    """CPU seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - started


def random_scores(samples: list[Sample], rng: np.random.Generator) -> list[ScoredSample]:
    layer_scores = rng.random((len(samples), NUM_LAYERS), dtype=np.float32)
    scores = rng.random(len(samples)).astype(np.float32).tolist()
    return [
        ScoredSample(sample.sample_id, score, 300, 200, False, layers)
        for sample, score, layers in zip(samples, scores, layer_scores, strict=True)
    ]


def measure(data: str, model: str, folder: RunFolder, rows_per_shard: int) -> dict[str, object]:
    watch, rng = Stopwatch(), np.random.default_rng(0)
    tokenizer = ScoringEngine.from_pretrained(model, device="cpu").tokenizer
    with watch.measuring("read_and_normalize"):
        summary = write_corpus([data], folder.corpus, rows_per_shard=rows_per_shard)
    folder.scored.mkdir()
    num_tokens = 0
    for shard in folder.corpus_shards():
        with watch.measuring("read_shard"):
            rows = read_shard(shard)
        with watch.measuring("tokenize"):
            tokenized = tokenizer.tokenize([sample for _, sample in rows])
        num_tokens += sum(len(sample.token_ids) for sample in tokenized)
        outcomes = random_scores([sample for _, sample in rows], rng)
        with watch.measuring("write_scores"):
            write_parquet(folder.scored / shard.name, scored_table(rows, outcomes))
    with watch.measuring("survey_of_shards"):
        survey(folder.scored_shards())
    with watch.measuring("write_selected"):
        kept = write_piece(folder, folder.root, BEST, None, (), folder.scored_shards())
    return {
        "num_kept": kept.counts.num_rows.total(),
        **summarize(folder, watch, summary, num_tokens),
    }


def summarize(
    folder: RunFolder, watch: Stopwatch, summary: CorpusSummary, num_tokens: int
) -> dict[str, object]:
    num_rows = summary.num_read - summary.num_rejected
    seconds = watch.seconds
    scored_bytes = sum(shard.stat().st_size for shard in folder.scored_shards())
    return {
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "cpu_seconds": {part: round(s, 3) for part, s in seconds.items()},
        "rows_per_cpu_second": {part: round(num_rows / s) for part, s in seconds.items()},
        "tokens_per_cpu_second": round(num_tokens / seconds["tokenize"]),
        "survey_cpu_ms_per_shard": round(1e3 * seconds["survey_of_shards"] / summary.num_shards, 2),
        "scored_bytes_per_row": round(scored_bytes / num_rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(DEMO_CORPUS))
    parser.add_argument(
        "--model", default=str(EMBEDDED_SELECTOR), help="model whose tokenizer to use"
    )
    parser.add_argument("--rows-per-shard", type=int, nargs="+", default=[512, 4_096])
    parser.add_argument("--quick", action="store_true", help="the demo corpus; no result file")
    args = parser.parse_args()
    if args.quick:
        args.data, args.rows_per_shard = str(DEMO_CORPUS), [512]
    pa.set_cpu_count(1)
    measured = {}
    for rows_per_shard in args.rows_per_shard:
        with tempfile.TemporaryDirectory() as folder:
            measured[f"{rows_per_shard}_rows_per_shard"] = measure(
                args.data, args.model, RunFolder(Path(folder)), rows_per_shard
            )
    report("bench_stages", measured, quick=args.quick)


if __name__ == "__main__":
    with one_line_errors():
        main()
