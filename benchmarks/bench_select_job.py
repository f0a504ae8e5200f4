"""The select job against the bare engine, and the driver's memory against the corpus size.

    python benchmarks/bench_select_job.py --data ../shared/data/instructions/dolly.jsonl

Time: the job's seconds after Ray is ready, actors' start and every file included, over the
seconds of one engine in a process of its own that has the same rows in memory, the same CPU threads
and nothing else to do; in turn, `--repeats` times. Memory: the driver's peak resident size on the
corpus and on ten times the corpus, whose rows are cut to 32 tokens, since rows count here and
not tokens.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import describe_run, write_result  # noqa: E402

READY = re.compile(r"Ray is ready: .* \(([\d.]+) s\)")
NUM_COPIES = 10
ENGINE = """
import sys, time, torch
from selectmoe.data.readers import read_corpus
from selectmoe.scoring import ScoringEngine
torch.set_num_threads(int(sys.argv[2]))
samples = list(read_corpus(sys.argv[1]))
engine = ScoringEngine.from_pretrained(device="cpu")
started = time.perf_counter()
for start in range(0, len(samples), 512):
    engine.score(samples[start : start + 512])
print(time.perf_counter() - started)
"""


def engine_seconds(corpus: Path, num_threads: int) -> float:
    """Tokenising and scoring, without imports and loading."""
    answer = subprocess.run(
        [sys.executable, "-c", ENGINE, str(corpus), str(num_threads)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(answer.stdout)


def run_job(corpus: Path, *settings: str) -> tuple[float, float]:
    """Seconds after Ray was ready, and the driver's peak resident size in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "jobs" / "select.py"), "--pct", "0.05"]
        command += ["--data", str(corpus), "--output", f"{folder}/run", *settings]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        ready_seconds = 0.0
        assert process.stderr is not None
        for line in process.stderr:
            if READY.search(line):
                ready_seconds = time.perf_counter() - started
        # wait4 and not wait: the kernel's high-water mark of this process, to its very end.
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the job failed: {' '.join(command)}")
        return time.perf_counter() - started - ready_seconds, usage.ru_maxrss / 1_000


def write_copies(corpus: Path, target: Path) -> None:
    """The corpus NUM_COPIES times, each with ids of its own."""
    with target.open("w", encoding="utf-8") as file:
        for number in range(NUM_COPIES):
            for line in corpus.open(encoding="utf-8"):
                row = json.loads(line)
                file.write(json.dumps({**row, "id": f"{row.get('id', '')}-{number}"}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "selectmoe/assets/demo_corpus.jsonl")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--num-cpus", type=int, default=2)
    parser.add_argument("--memory-only", action="store_true")
    args = parser.parse_args()

    measured: dict[str, object] = {}
    if not args.memory_only:
        engine, job = [], []
        for _ in range(args.repeats):
            engine.append(engine_seconds(args.data, args.num_cpus))
            job.append(run_job(args.data, "--num-actors", str(args.num_cpus))[0])
        measured["engine_seconds"] = [round(seconds, 1) for seconds in engine]
        measured["job_seconds_after_ray_start"] = [round(seconds, 1) for seconds in job]
        ratios = [j / e for j, e in zip(job, engine, strict=True)]
        measured["ratio_median"] = round(statistics.median(ratios), 3)
    short = "dataset.max_sequence_length=32"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / args.data.name
        write_copies(args.data, large)
        peaks = [run_job(corpus, short)[1] for corpus in (args.data, large)]
    measured["driver_peak_mb"] = {"corpus": round(peaks[0]), "ten_times": round(peaks[1])}
    measured["driver_peak_ratio"] = round(peaks[1] / peaks[0], 3)
    write_result("bench_select_job", {**describe_run(), **measured})


if __name__ == "__main__":
    main()
