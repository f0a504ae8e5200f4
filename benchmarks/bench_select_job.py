"""The select job: against the bare engine, two actors against one, its start-up, its memory.

    python benchmarks/bench_select_job.py --data ../shared/data/instructions/dolly.jsonl
    python benchmarks/bench_select_job.py --only startup

job: the job's seconds after Ray is ready, actors' start and every file included, over those of bare
engines that have the same rows in memory and nothing else to do: one with a thread a CPU, and one a
CPU with a thread each, which is what the job has; on the corpus `--copies` times over, in turn,
`--repeats` times.
actors: one actor against two, of one thread each, on all of the corpus, since a few shards would
measure how they divide by two; rows a second from the first finished shard to the last, and of the
whole job.
startup: seconds until Ray is ready, the corpus is normalised, the first and the last score are
there, and the process has ended; of the demo corpus.
memory: peak resident sizes of the driver and of the largest actor, and the most that all processes
together had of shared memory, where the object store is (a page counts for each that has it); on
the corpus and `--copies` times over, with rows cut to 32 tokens, since rows count here and not
tokens.

Each part goes to a file of its own in benchmarks/results/ when measured. --num-rows bounds the time
of job and memory, which grows with it and with --copies.
"""

import argparse
import contextlib
import itertools
import json
import re
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

from benchmarks.results import describe_run, one_line_errors, print_result, write_result  # noqa: E402
from selectmoe.paths import DEMO_CORPUS  # noqa: E402

SECONDS_BETWEEN_LOOKS = 0.1  # for a size of one file: nothing beside the job
SECONDS_BETWEEN_MEMORY_LOOKS = 0.5
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
    """Seconds since the start of the process, and peaks in MB."""

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
        """Between the first finished shard and the last; 0 where there is only one."""
        seconds = self.last_score - self.first_score
        return (self.num_rows - self.rows_at_first_score) / seconds if seconds else 0.0

    def startup(self) -> dict[str, float]:
        names = ("ray_ready", "corpus", "first_score", "last_score", "ended")
        return {name: round(asdict(self)[name], 2) for name in names}


def engine_seconds(corpus: Path, *, num_engines: int, num_threads: int) -> float:
    """Tokenising and scoring by engines side by side, without imports and loading."""
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
    """Runs `jobs/select.py` and looks on."""
    found, ended = JobRun(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "jobs" / "select.py"), "--pct", "0.05"]
        command += ["--data", str(corpus), "--output", f"{folder}/run", *settings]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        finished = Path(folder) / "run" / "scored" / "_finished.jsonl"
        watchers = [threading.Thread(target=watch_scores, args=(finished, started, found, ended))]
        if watch_memory:
            watchers.append(threading.Thread(target=watch_memory, args=(process.pid, found, ended)))
        for watcher in watchers:
            watcher.start()
        assert process.stderr is not None
        complaint = ""
        for line in process.stderr:
            complaint = line
            if re.match(r"Ray is ready: ", line):
                found.ray_ready = time.perf_counter() - started
            elif re.match(r"corpus: ", line):
                found.corpus = time.perf_counter() - started
        status = process.wait()
        found.ended = time.perf_counter() - started
        ended.set()
        for watcher in watchers:
            watcher.join()
    if status:
        sys.exit(f"the job failed: {' '.join(command)}: {complaint}")
    return found


def watch_scores(file: Path, started: float, found: JobRun, ended: threading.Event) -> None:
    size = 0
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        if not file.is_file() or file.stat().st_size == size:
            continue
        size = file.stat().st_size
        found.last_score = time.perf_counter() - started
        found.num_rows = sum(json.loads(line)["num_rows"] for line in file.open("rb"))
        if not found.first_score:
            found.first_score, found.rows_at_first_score = found.last_score, found.num_rows


def watch_memory(pid: int, found: JobRun, ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_MEMORY_LOOKS):
        # High-water marks of the kernel, which no moment between two looks escapes. Not wait4's
        # ru_maxrss: it begins with what this process, which has torch, had at the fork.
        note_peak(found, "driver", memory_mb(pid, "VmHWM"))
        shared_mb = memory_mb(pid, "RssShmem")
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(pid).children(recursive=True):
                shared_mb += memory_mb(process.pid, "RssShmem")
                if " ".join(process.cmdline()).startswith("ray::MapWorker"):
                    note_peak(found, "largest_actor", memory_mb(process.pid, "VmHWM"))
        note_peak(found, "object_store_at_most", shared_mb)


def note_peak(found: JobRun, key: str, megabytes: float) -> None:
    found.peaks_mb[key] = max(found.peaks_mb.get(key, 0.0), round(megabytes, 1))


def memory_mb(pid: int, row: str) -> float:
    with contextlib.suppress(OSError):  # it has just ended
        number = re.search(rf"^{row}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        return int(number[1]) / 1e3 if number else 0.0
    return 0.0


def first_rows(args: argparse.Namespace, folder: Path, *, copies: int) -> Path:
    """The first rows of the corpus so many times over, each with an id of its own."""
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
    many = first_rows(args, folder, copies=args.copies)
    job: list[float] = []
    bare: dict[str, list[float]] = {"one_engine": [], "an_engine_a_cpu": []}
    for _ in range(args.repeats):
        bare["one_engine"].append(engine_seconds(many, num_engines=1, num_threads=args.num_cpus))
        run = run_job(many, "--num-actors", str(args.num_cpus))
        job.append(run.ended - run.ray_ready)
        bare["an_engine_a_cpu"].append(
            engine_seconds(many, num_engines=args.num_cpus, num_threads=1)
        )
    return {
        "copies": args.copies,
        "num_rows": run.num_rows,
        "job_seconds_after_ray_start": [round(seconds, 1) for seconds in job],
        "bare_seconds": {way: [round(s, 1) for s in seconds] for way, seconds in bare.items()},
        "job_over_bare": {
            way: [round(j / s, 3) for j, s in zip(job, seconds, strict=True)]
            for way, seconds in bare.items()
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
        run_job(first_rows(args, folder, copies=copies), short, watch_memory=watch_memory)
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
    parser.add_argument("--num-rows", type=int, help="the first so many; default: all")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--num-cpus", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="job alone, 600 rows; no result file")
    args = parser.parse_args()
    if args.quick:
        args.only, args.num_rows, args.copies, args.repeats = ["job"], 600, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            measured = {**describe_run(), **PARTS[part](args, Path(folder))}
            if args.quick:
                print_result(measured)
            else:
                write_result(f"bench_select_job_{part}", measured)


if __name__ == "__main__":
    with one_line_errors():
        main()
