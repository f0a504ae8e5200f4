"""Speed, start-up and memory of the select job.

    python benchmarks/bench_select_job.py --data ../shared/data/instructions/dolly.jsonl
    python benchmarks/bench_select_job.py --only startup

job: seconds of the job from the moment Ray is ready, including the start of the actors and all
files, over the seconds of bare engines that have the same rows in memory and do nothing else: one
engine with one thread per CPU, and one single-threaded engine per CPU, as the job has. On the
corpus repeated `--copies` times, in turn, `--repeats` times.
actors: one actor against two, single-threaded, on the whole corpus, since a few shards may not
divide by two; rows per second between the first finished shard and the last, and of the whole job.
startup: seconds until Ray is ready, the corpus is normalized, the first and the last score are
written, and the process has exited; on the demo corpus.
memory: peak resident size of the driver and of the largest actor, and peak shared memory, where
the object store is, summed over all processes (a shared page counts once per process); on the
corpus and on the corpus repeated `--copies` times, truncated to 32 tokens per row, since memory
depends on rows and not on tokens.

Each part is written to its own file in benchmarks/results/. --num-rows limits the time of job and
memory, which grows with it and with --copies.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.process_memory import process_tree, read_mb  # noqa: E402
from benchmarks.results import one_line_errors, report  # noqa: E402
from selectmoe.paths import DEMO_CORPUS  # noqa: E402

SCORE_POLL_SECONDS = 0.1  # reads the size of one file
MEMORY_POLL_SECONDS = 0.5
ENGINE = """
import sys, time, torch
from selectmoe.data.readers import read_corpus
from selectmoe.scoring.engine import ScoringEngine
corpus, num_threads, first, step = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(num_threads)
samples = list(read_corpus(corpus))[first::step]
engine = ScoringEngine.from_pretrained(device="cpu")
started = time.time()
for start in range(0, len(samples), 512):
    engine.score(samples[start : start + 512])
print(started, time.time())
"""


@dataclass(kw_only=True, slots=True)
class JobRun:
    """Seconds since the start of the process, and peak memory in MB."""

    ray_ready: float = 0.0
    corpus: float = 0.0
    first_score: float = 0.0
    last_score: float = 0.0
    ended: float = 0.0
    rows_at_first_score: int = 0
    num_rows: int = 0
    peaks_mb: dict[str, float] = field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        """Between the first finished shard and the last; 0 if there is only one."""
        seconds = self.last_score - self.first_score
        return (self.num_rows - self.rows_at_first_score) / seconds if seconds else 0.0

    def startup(self) -> dict[str, float]:
        names = ("ray_ready", "corpus", "first_score", "last_score", "ended")
        return {name: round(asdict(self)[name], 2) for name in names}


def engine_seconds(corpus: Path, *, num_engines: int, num_threads: int) -> float:
    """Wall time of tokenizing and scoring with parallel engines, without imports and loading."""
    engines = [
        subprocess.Popen(
            [sys.executable, "-c", ENGINE, *map(str, (corpus, num_threads, first, num_engines))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(num_engines)
    ]
    printed = [engine.communicate()[0] for engine in engines]
    if any(engine.returncode for engine in engines):
        sys.exit("a bare engine failed")
    starts, ends = zip(*(map(float, line.split()) for line in printed), strict=True)
    return float(max(ends) - min(starts))


def run_job(
    corpus: Path, *settings: str, watch_memory: Callable[..., None] | None = None
) -> JobRun:
    """Runs `jobs/select.py` and measures it."""
    job, ended = JobRun(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "jobs" / "select.py"), "--pct", "0.05"]
        command += ["--data", str(corpus), "--output", f"{folder}/run", *settings]
        command += ["selection.duplicates=keep"]  # the corpus may be one that was repeated
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        finished = Path(folder) / "run" / "scored" / "_finished.jsonl"
        watchers = [threading.Thread(target=watch_scores, args=(finished, started, job, ended))]
        if watch_memory:
            watchers.append(threading.Thread(target=watch_memory, args=(process.pid, job, ended)))
        for watcher in watchers:
            watcher.start()
        last_line = follow_log(process, started, job)
        status = process.wait()
        job.ended = time.perf_counter() - started
        ended.set()
        for watcher in watchers:
            watcher.join()
    if status:
        sys.exit(f"error: the job failed: {' '.join(command)}: {last_line}")
    return job


def follow_log(process: subprocess.Popen[str], started: float, job: JobRun) -> str:
    """Reads the log until the process closes it; returns the last line."""
    line = ""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Ray is ready: "):
            job.ray_ready = time.perf_counter() - started
        elif line.startswith("corpus: "):
            job.corpus = time.perf_counter() - started
    return line


def watch_scores(file: Path, started: float, job: JobRun, ended: threading.Event) -> None:
    size = 0
    while not ended.wait(SCORE_POLL_SECONDS):
        if not file.is_file() or file.stat().st_size == size:
            continue
        size = file.stat().st_size
        job.last_score = time.perf_counter() - started
        job.num_rows = sum(json.loads(line)["num_rows"] for line in file.open("rb"))
        if not job.first_score:
            job.first_score, job.rows_at_first_score = job.last_score, job.num_rows


def watch_memory(pid: int, job: JobRun, ended: threading.Event) -> None:
    while not ended.wait(MEMORY_POLL_SECONDS):
        # VmHWM is kept by the kernel, so no peak between two polls is missed.
        record_peak(job, "driver", read_mb(pid, "VmHWM"))
        processes = process_tree(pid)
        for process in processes:
            if is_actor(process):
                record_peak(job, "largest_actor", read_mb(process.pid, "VmHWM"))
        shared_mb = sum(read_mb(process.pid, "RssShmem") for process in processes)
        record_peak(job, "object_store_at_most", shared_mb)


def is_actor(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::MapWorker")
    except psutil.Error:  # it has just exited
        return False


def record_peak(job: JobRun, key: str, megabytes: float) -> None:
    job.peaks_mb[key] = max(job.peaks_mb.get(key, 0.0), round(megabytes, 1))


def repeat_rows(args: argparse.Namespace, folder: Path, *, copies: int) -> Path:
    """The first rows of the corpus, repeated `copies` times with unique ids."""
    target = folder / f"{copies}.jsonl"
    with target.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            with args.data.open(encoding="utf-8") as lines:
                for number, line in enumerate(itertools.islice(lines, args.num_rows)):
                    row = json.loads(line)
                    row_id = f"{row.get('id', number)}-{copy}"
                    file.write(json.dumps({**row, "id": row_id}, ensure_ascii=False) + "\n")
    return target


def measure_job(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    corpus = repeat_rows(args, folder, copies=args.copies)
    job: list[float] = []
    engines: dict[str, list[float]] = {"one_engine": [], "one_engine_per_cpu": []}
    for _ in range(args.repeats):
        engines["one_engine"].append(
            engine_seconds(corpus, num_engines=1, num_threads=args.num_cpus)
        )
        run = run_job(corpus, "--num-actors", str(args.num_cpus))
        job.append(run.ended - run.ray_ready)
        engines["one_engine_per_cpu"].append(
            engine_seconds(corpus, num_engines=args.num_cpus, num_threads=1)
        )
    return {
        "copies": args.copies,
        "num_rows": run.num_rows,
        "job_seconds_after_ray_start": [round(seconds, 1) for seconds in job],
        "engine_seconds": {name: [round(s, 1) for s in taken] for name, taken in engines.items()},
        "job_over_engine": {
            name: [round(j / s, 3) for j, s in zip(job, taken, strict=True)]
            for name, taken in engines.items()
        },
    }


def measure_actors(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    steady, whole = [], []
    for _ in range(args.repeats):
        one, two = (
            run_job(args.data, "--num-actors", number, "num_threads_per_actor=1") for number in "12"
        )
        steady.append(two.rows_per_second / one.rows_per_second if one.rows_per_second else 0.0)
        whole.append(one.ended / two.ended)
    return {
        "num_rows": two.num_rows,
        "rows_per_second_first_to_last_shard": {
            "one": round(one.rows_per_second, 1),
            "two": round(two.rows_per_second, 1),
        },
        "two_over_one_first_to_last_shard": [round(ratio, 2) for ratio in steady],
        "two_over_one_whole_job": [round(ratio, 2) for ratio in whole],
    }


def measure_startup(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    return {"seconds_until": [run_job(DEMO_CORPUS).startup() for _ in range(args.repeats)]}


def measure_memory(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    short = "dataset.max_sequence_length=32"
    small, large = (
        run_job(repeat_rows(args, folder, copies=copies), short, watch_memory=watch_memory)
        for copies in (1, args.copies)
    )
    return {
        "num_rows": [small.num_rows, large.num_rows],
        "peaks_mb": [small.peaks_mb, large.peaks_mb],
        "ratios": {
            key: round(large.peaks_mb[key] / max(small.peaks_mb[key], 0.1), 3)
            for key in small.peaks_mb
        },
    }


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, object]]] = {
    "startup": measure_startup,
    "actors": measure_actors,
    "memory": measure_memory,
    "job": measure_job,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEMO_CORPUS)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--num-rows", type=int, help="number of rows; default: all")
    parser.add_argument("--copies", type=int, default=10, help="repetitions of the corpus")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--num-cpus", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="job only, 600 rows; no result file")
    args = parser.parse_args()
    if args.quick:
        args.only, args.num_rows, args.copies, args.repeats = ["job"], 600, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            measured = PARTS[part](args, Path(folder))
            report(f"bench_select_job_{part}", measured, quick=args.quick)


if __name__ == "__main__":
    with one_line_errors():
        main()
