"""Exact top-k selection from a hundred million scores in parquet, against a sort by Ray Data.

    python benchmarks/bench_topk.py            # needs 3 GB of disk
    python benchmarks/bench_topk.py --quick    # sizes a hundred times smaller

Random scores are written as the select job writes them, a million rows per file, without the
columns that the selection never reads (layer scores, id, source). Then, each in a separate process:
the passes over the scores on threads, the passes as Ray Data maps, and `Dataset.sort().limit()` on
growing sizes until one fails or takes longer than `--sort-timeout`. Seconds are from the first file
read to the indices of all kept rows, without the start of Ray. Memory: peak resident size of the
driver, and peak proportional set size (PSS) of the driver, Ray and its workers together.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.process_memory import process_tree, read_mb  # noqa: E402
from selectmoe.config.selection import SelectConfig  # noqa: E402
from selectmoe.corpus.map_items import MapItems, map_in_threads  # noqa: E402
from selectmoe.selection.keep_rule import kept_rows  # noqa: E402
from selectmoe.selection.passes import Survey, shard_groups, survey  # noqa: E402
from selectmoe.selection.strategies import ScoredRows, choose_rows  # noqa: E402
from selectmoe.selection.top_k import num_to_keep  # noqa: E402

PERCENTAGE = 0.05
SIZES = (1_000_000, 10_000_000, 100_000_000)
SORT_SIZES = (5_000_000, 10_000_000, 20_000_000, 40_000_000, 100_000_000)
EXACT_SIZE = 5_000_000
ROWS_PER_FILE = 1_000_000
QUICK_DIVISOR = 100
DATASETS = ("cot", "dolly", "flan_v2", "oasst1")
MEMORY_POLL_SECONDS = 0.2


def write_scores(folder: Path, num_rows: int, rows_per_file: int, *, decimals: int | None) -> None:
    """decimals: rounds the scores, which makes most of them ties."""
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
            "num_answer_tokens": rng.integers(1, 500, num_rows, dtype=np.int32),
            "truncated": rng.random(num_rows, dtype=np.float32) < 0.02,
        }
    )


def select(shards: list[Path], map_items: MapItems) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields each shard with the indices of its kept rows, as the select job finds them."""
    groups = shard_groups(shards)
    scored = ScoredRows(groups, Survey.total(map_items(survey, groups)), map_items)
    rule = choose_rows(SelectConfig(selection_percentage=PERCENTAGE), scored).rule
    for shard in shards:
        yield shard, kept_rows(rule, shard).row_numbers


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
    """The straightforward way, by Ray Data. It breaks ties arbitrarily."""
    import ray

    from jobs.on_ray.session import start_ray

    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    rows = ray.data.read_parquet(str(folder), columns=["score", "row_key"])
    num_kept = num_to_keep(rows.count(), PERCENTAGE)
    best = rows.sort("score", descending=True).limit(num_kept)
    num_kept = sum(len(batch["row_key"]) for batch in best.iter_batches(batch_format="pyarrow"))
    return {"seconds": round(time.perf_counter() - started, 2), "num_kept": num_kept}


METHODS: dict[str, Callable[[Path], dict[str, object]]] = {
    "threads": select_in_threads,
    "ray": select_on_ray,
    "sort": select_by_sorting,
}


def run_child(method: str, folder: Path, timeout_seconds: float) -> dict[str, object]:
    """Runs one method in a separate process; {"failure": reason} if it fails or times out."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--method", method, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks, ended = [0.0], threading.Event()
    sampler = threading.Thread(target=sample_memory, args=(process.pid, peaks, ended))
    sampler.start()
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        return {"failure": f"timed out after {timeout_seconds:.0f} s"}
    finally:
        ended.set()
        sampler.join()
    if process.returncode:
        return {"failure": (stderr.strip().splitlines() or ["killed"])[-1][:200]}
    # Ray Data also prints to standard output, even after the last row.
    [answer] = [line for line in stdout.splitlines() if line.startswith('{"seconds"')]
    measured: dict[str, object] = json.loads(answer)
    return {**measured, "peak_pss_of_all_mb": round(peaks[0])}


def sample_memory(pid: int, peaks: list[float], ended: threading.Event) -> None:
    while not ended.wait(MEMORY_POLL_SECONDS):
        tree = process_tree(pid)
        pss_mb = sum(read_mb(process.pid, "Pss", file="smaps_rollup") for process in tree)
        peaks[0] = max(peaks[0], pss_mb)


def kill_tree(process: subprocess.Popen[str]) -> None:
    for member in process_tree(process.pid):
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.communicate()


def is_exact(folder: Path) -> bool:
    """Whether the kept rows are the first ones of a complete sort by NumPy."""
    shards = sorted(folder.glob("*.parquet"))
    tables = [pq.read_table(shard, columns=["score", "row_key"]) for shard in shards]
    scores = np.concatenate([table["score"].to_numpy() for table in tables])
    keys = np.concatenate([np.array(t["row_key"].to_pylist(), dtype="S32") for t in tables])
    starts = dict(zip(shards, np.cumsum([0, *(t.num_rows for t in tables[:-1])]), strict=True))
    expected = np.lexsort((keys, -scores))[: num_to_keep(len(scores), PERCENTAGE)]
    kept = [starts[shard] + rows for shard, rows in select(shards, map_in_threads)]
    return np.array_equal(np.sort(expected), np.concatenate(kept))


def measure_sizes(scratch: Path, args: argparse.Namespace) -> dict[str, dict[str, object]]:
    divisor = QUICK_DIVISOR if args.quick else 1
    by_size: dict[str, dict[str, object]] = {}
    sort_failed = False
    for num_rows in sorted({*args.sizes, *args.sort_sizes}):
        methods = ["threads", "ray"] if num_rows in args.sizes else []
        methods += ["sort"] if num_rows in args.sort_sizes and not sort_failed else []
        if not methods:
            continue
        folder = scratch / str(num_rows)
        write_scores(folder, num_rows // divisor, ROWS_PER_FILE // divisor, decimals=None)
        measured = {method: run_child(method, folder, args.sort_timeout) for method in methods}
        sort_failed = sort_failed or "failure" in measured.get("sort", {})
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        by_size[f"{num_rows // divisor:,}"] = {"parquet_mb": round(megabytes), **measured}
        shutil.rmtree(folder)
    return by_size


def compare_with_sort(scratch: Path, *, divisor: int) -> dict[str, dict[str, object]]:
    """The selection against NumPy's sort, with few ties and with many."""
    compared: dict[str, dict[str, object]] = {}
    for name, decimals in (("exact", None), ("exact_among_ties", 3)):
        folder = scratch / name
        write_scores(folder, EXACT_SIZE // divisor, ROWS_PER_FILE // divisor, decimals=decimals)
        compared[name] = {"num_rows": EXACT_SIZE // divisor, "as_numpy_sorts": is_exact(folder)}
        shutil.rmtree(folder)
    return compared


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="sizes divided by 100, one of them for the sort; no result file",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--sort-sizes", type=int, nargs="*", default=list(SORT_SIZES))
    parser.add_argument("--sort-timeout", type=float, default=600.0, help="seconds per method")
    parser.add_argument("--method", choices=sorted(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.sort_sizes = SIZES[-1:], SORT_SIZES[:1]
    return args


def main() -> None:
    args = parse_arguments()
    if args.method:
        measured = METHODS[args.method](args.folder)
        peak_mb = round(read_mb(os.getpid(), "VmHWM"))
        print(json.dumps({**measured, "driver_peak_mb": peak_mb}))
        return
    # Imported here because it imports torch, which would add to the memory of a measured process.
    from benchmarks.results import report

    with tempfile.TemporaryDirectory(prefix="topk-") as folder:
        by_size = measure_sizes(Path(folder), args)
        compared = compare_with_sort(Path(folder), divisor=QUICK_DIVISOR if args.quick else 1)
    result = {"percentage": PERCENTAGE, "by_num_rows": by_size, **compared}
    report("bench_topk", result, quick=args.quick)
    for name, comparison in compared.items():
        if not comparison["as_numpy_sorts"]:
            sys.exit(f"error: {name}: the kept rows differ from NumPy's sort")


if __name__ == "__main__":
    main()
