"""The exact top-k of a hundred million scores in parquet, against Ray Data's sort.

    python benchmarks/bench_topk.py            # needs 3 GB of disk
    python benchmarks/bench_topk.py --quick    # sizes a hundred times smaller

Random scores are written as the select job writes them, a million rows a file, without the columns
that top-k never reads (layer scores, id, source). Then, each in a process of its own: the passes on
threads, the passes as Ray Data maps, and `Dataset.sort().limit()` on growing sizes until one fails
or takes longer than `--sort-timeout`. Seconds count from the first file read to the numbers of all
kept rows, Ray's start apart. Memory: the driver's peak resident size, and the peak proportional set
size (PSS: shared pages are divided by their users) of the driver, Ray and its workers together.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from selectmoe.corpus.map_items import MapItems, map_in_threads  # noqa: E402
from selectmoe.selection.passes import (  # noqa: E402
    Survey,
    find_thresholds,
    kept_rows,
    shard_groups,
    survey,
)
from selectmoe.selection.top_k import num_to_keep  # noqa: E402

PERCENTAGE = 0.05
SIZES = (1_000_000, 10_000_000, 100_000_000)
SORT_SIZES = (5_000_000, 10_000_000, 20_000_000, 40_000_000, 100_000_000)
EXACT_SIZE = 5_000_000
ROWS_PER_FILE = 1_000_000
QUICK_DIVISOR = 100
DATASETS = ("cot", "dolly", "flan_v2", "oasst1")
SECONDS_BETWEEN_SAMPLES = 0.2


def write_scores(folder: Path, num_rows: int, rows_per_file: int, *, decimals: int | None) -> None:
    """decimals: rounds the scores, so that very many of them tie."""
    folder.mkdir()
    for number, start in enumerate(range(0, num_rows, rows_per_file)):
        table = random_table(number, min(rows_per_file, num_rows - start), decimals)
        pq.write_table(table, folder / f"shard-{number:06d}.parquet", compression="zstd")


def random_table(seed: int, num_rows: int, decimals: int | None) -> pa.Table:
    rng = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-1.5 * rng.standard_normal(num_rows, dtype=np.float32)))
    if decimals is not None:
        scores = scores.round(decimals)
    keys = pa.py_buffer(rng.bytes(16 * num_rows).hex().encode())
    offsets = pa.py_buffer(np.arange(0, 32 * num_rows + 1, 32, dtype=np.int32))
    codes = pa.array(rng.integers(0, len(DATASETS), num_rows, dtype=np.int8))
    return pa.table(
        {
            "row_key": pa.StringArray.from_buffers(num_rows, offsets, keys),
            "dataset": pa.DictionaryArray.from_arrays(codes, list(DATASETS)).cast(pa.string()),
            "score": scores.astype(np.float32),
            "num_tokens": rng.integers(20, 1_000, num_rows, dtype=np.int32),
            "truncated": rng.random(num_rows, dtype=np.float32) < 0.02,
        }
    )


def select(shards: list[Path], map_items: MapItems) -> Iterator[tuple[Path, np.ndarray]]:
    """What the select job does, but for the texts: the numbers of the kept rows of each shard."""
    groups = shard_groups(shards)
    surveyed = Survey.total(map_items(survey, groups))
    thresholds = find_thresholds(
        groups,
        surveyed.first_digits,
        selection_percentage=PERCENTAGE,
        per_dataset=False,
        map_items=map_items,
    )
    for shard in shards:
        yield shard, kept_rows(thresholds, shard)[0]


def select_by_passes(folder: Path, map_items: MapItems) -> dict[str, object]:
    shards = sorted(folder.glob("*.parquet"))
    started = time.perf_counter()
    num_kept = sum(len(rows) for _, rows in select(shards, map_items))
    return {"seconds": round(time.perf_counter() - started, 2), "num_kept": num_kept}


def select_in_threads(folder: Path) -> dict[str, object]:
    return select_by_passes(folder, map_in_threads)


def select_on_ray(folder: Path) -> dict[str, object]:
    from jobs.on_ray.map_items import MapOnRay
    from jobs.on_ray.session import start_ray

    start_ray()
    return select_by_passes(folder, MapOnRay())


def select_by_sorting(folder: Path) -> dict[str, object]:
    """What one writes first. It settles ties by chance and carries the row's key along."""
    import ray

    from jobs.on_ray.session import start_ray

    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    rows = ray.data.read_parquet(str(folder), columns=["score", "row_key"])
    num_kept = num_to_keep(rows.count(), PERCENTAGE)
    best = rows.sort("score", descending=True).limit(num_kept)
    found = sum(len(batch["row_key"]) for batch in best.iter_batches(batch_format="pyarrow"))
    return {"seconds": round(time.perf_counter() - started, 2), "num_kept": found}


WAYS: dict[str, Callable[[Path], dict[str, object]]] = {
    "threads": select_in_threads,
    "ray": select_on_ray,
    "sort": select_by_sorting,
}


def run_child(way: str, folder: Path, timeout_seconds: float) -> dict[str, object]:
    """One way in a process of its own; {"failure": …} where it does not come to an end."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks, ended = [0.0], threading.Event()
    sampler = threading.Thread(target=sample_memory, args=(process.pid, peaks, ended))
    sampler.start()
    try:
        printed, complaint = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        end_family(process)
        return {"failure": f"not done after {timeout_seconds:.0f} s"}
    finally:
        ended.set()
        sampler.join()
    if process.returncode:
        return {"failure": (complaint.strip().splitlines() or ["killed"])[-1][:200]}
    # Ray Data prints to standard output too, even after its last row.
    [answer] = [line for line in printed.splitlines() if line.startswith('{"seconds"')]
    measured: dict[str, object] = json.loads(answer)
    return {**measured, "peak_pss_of_all_mb": round(peaks[0])}


def sample_memory(pid: int, peaks: list[float], ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_SAMPLES):
        peaks[0] = max(peaks[0], sum(map(proportional_mb, family(pid))))


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def proportional_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        kilobytes = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        return int(kilobytes[1]) / 1_000 if kilobytes else 0.0
    return 0.0


def end_family(process: subprocess.Popen[str]) -> None:
    for member in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.communicate()


def driver_peak_mb() -> float:
    """Of this process. Not ru_maxrss, which begins with what the parent had when it forked."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1_000)


def is_exact(folder: Path) -> bool:
    """Whether the rows that are kept are those of NumPy's sort of everything."""
    shards = sorted(folder.glob("*.parquet"))
    tables = [pq.read_table(shard, columns=["score", "row_key"]) for shard in shards]
    scores = np.concatenate([table["score"].to_numpy() for table in tables])
    keys = np.concatenate([np.array(t["row_key"].to_pylist(), dtype="S32") for t in tables])
    starts = dict(zip(shards, np.cumsum([0, *(t.num_rows for t in tables[:-1])]), strict=True))
    expected = np.lexsort((keys, -scores))[: num_to_keep(len(scores), PERCENTAGE)]
    kept = [starts[shard] + rows for shard, rows in select(shards, map_in_threads)]
    return np.array_equal(np.sort(expected), np.concatenate(kept))


def measure_sizes(scratch: Path, args: argparse.Namespace) -> dict[str, object]:
    divisor = QUICK_DIVISOR if args.quick else 1
    measured: dict[str, object] = {}
    by_size: dict[str, dict[str, object]] = {}
    sort_failed = False
    for num_rows in sorted({*args.sizes, *args.sort_sizes}):
        folder = scratch / str(num_rows)
        ways = ["threads", "ray"] if num_rows in args.sizes else []
        ways += ["sort"] if num_rows in args.sort_sizes and not sort_failed else []
        if not ways:
            continue
        write_scores(folder, num_rows // divisor, ROWS_PER_FILE // divisor, decimals=None)
        found = {way: run_child(way, folder, args.sort_timeout) for way in ways}
        sort_failed = sort_failed or "failure" in found.get("sort", {})
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        by_size[f"{num_rows // divisor:,}"] = {"parquet_mb": round(megabytes), **found}
        remove(folder)
    measured["by_num_rows"] = by_size
    for name, decimals in (("exact", None), ("exact_among_ties", 3)):
        folder = scratch / name
        write_scores(folder, EXACT_SIZE // divisor, ROWS_PER_FILE // divisor, decimals=decimals)
        measured[name] = {"num_rows": EXACT_SIZE // divisor, "as_numpy_sorts": is_exact(folder)}
        remove(folder)
    return measured


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="sizes a hundred times smaller, one for the sort; no result file",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--sort-sizes", type=int, nargs="*", default=list(SORT_SIZES))
    parser.add_argument("--sort-timeout", type=float, default=600.0, help="seconds a way may take")
    parser.add_argument("--way", choices=sorted(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps({**WAYS[args.way](args.folder), "driver_peak_mb": driver_peak_mb()}))
        return
    if args.quick:
        args.sizes, args.sort_sizes = SIZES[-1:], SORT_SIZES[:1]
    # Only here: it imports torch, which a measured process must not hold.
    from benchmarks.results import describe_run, print_result, write_result

    with tempfile.TemporaryDirectory(prefix="topk-") as scratch:
        measured = measure_sizes(Path(scratch), args)
    result = {**describe_run(), "percentage": PERCENTAGE, **measured}
    if args.quick:
        print_result(result)
    else:
        write_result("bench_topk", result)
    for name in ("exact", "exact_among_ties"):
        if not measured[name]["as_numpy_sorts"]:  # type: ignore[index]
            sys.exit(f"{name}: other rows are kept than by NumPy's sort")


if __name__ == "__main__":
    main()
