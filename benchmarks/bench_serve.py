"""What the service costs beside its engine: `python benchmarks/bench_serve.py [--data CORPUS]`.

In one run, on one machine: the bare engine's tokens/s on a pool of samples; 64 clients with 32
samples a request and with one; one client alone; four times the capacity, with the memory of all of
the server's processes; one scorer replica against two, beside one bare engine against two.
Load comes from a process of its own. `--only replicas` measures the last alone, and prints it.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import describe_run, one_line_errors, write_result  # noqa: E402
from selectmoe.data.packing import pad_samples_closely  # noqa: E402
from selectmoe.data.readers import read_corpus  # noqa: E402
from selectmoe.paths import DEMO_CORPUS  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402

DOLLY = ROOT.parent / "shared" / "data" / "instructions" / "dolly.jsonl"
URL = "http://127.0.0.1:8000"
READY_SECONDS = 180
NUM_CLIENTS = 64
OVERLOAD_CLIENTS = 256  # four times as many as the queue of that run holds samples


@dataclass(frozen=True, slots=True)
class Load:
    """What one crowd of clients saw."""

    seconds: float
    num_samples: int
    num_tokens: int
    statuses: dict[int, int]
    num_unanswered: int
    p50_milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def wire(sample: Sample) -> bytes:
    """As JSON, once: the clients share the cores with the server."""
    messages = [{"role": entry.role, "content": entry.content} for entry in sample.messages]
    return json.dumps({"messages": messages}).encode()


async def crowd(
    pool: list[bytes], *, num_clients: int, num_per_request: int, seconds: float
) -> Load:
    """Each client asks again as soon as it has an answer; after a 429, as soon as it may."""
    statuses: collections.Counter[int] = collections.Counter()
    latencies: list[float] = []
    num_samples = num_tokens = num_unanswered = 0
    started = time.perf_counter()

    async def ask(client: httpx.AsyncClient, seed: int) -> None:
        nonlocal num_samples, num_tokens, num_unanswered
        choice = random.Random(seed)
        while time.perf_counter() - started < seconds:
            body = b'{"samples":[' + b",".join(choice.sample(pool, num_per_request)) + b"]}"
            asked = time.perf_counter()
            try:
                answer = await client.post(f"{URL}/score", content=body)
            except httpx.TransportError:
                num_unanswered += 1
                continue
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                latencies.append(time.perf_counter() - asked)
                num_samples += num_per_request
                num_tokens += answer.json()["usage"]["tokens"]
            else:
                await asyncio.sleep(min(float(answer.headers.get("Retry-After", 1)), 1.0))

    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        await asyncio.gather(*(ask(client, seed) for seed in range(num_clients)))
    return Load(
        seconds=time.perf_counter() - started,
        num_samples=num_samples,
        num_tokens=num_tokens,
        statuses=dict(statuses),
        num_unanswered=num_unanswered,
        p50_milliseconds=round(1_000 * statistics.median(latencies), 1) if latencies else 0.0,
    )


def run_crowd(pool: list[bytes], settings: dict[str, float]) -> Load:
    return asyncio.run(crowd(pool, **settings))  # type: ignore[arg-type]


def load(pool: list[bytes], **settings: float) -> Load:
    """The crowd in a process of its own, so that this one can watch."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(run_crowd, (pool, settings))


@contextlib.contextmanager
def server(**settings: object) -> Iterator[psutil.Process]:
    """`serve run serve.app:app` with SELECTMOE_* settings, ready."""
    variables = {f"SELECTMOE_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [Path(sys.executable).with_name("serve"), "run", "serve.app:app"],
        cwd=ROOT, env={**os.environ, **variables},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_ready(process)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{URL}/health/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    sys.exit("the server did not get ready; is port 8000 free?")


def memory_megabytes(parent: psutil.Process) -> int:
    """Private memory of all processes: shared pages would be counted once for each."""
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total // 2**20


def measure_engine(samples: list[Sample]) -> dict[str, float]:
    """Tokens/s over the pool, and the median time of one sample, on one thread as a replica."""
    torch.set_num_threads(1)
    engine = ScoringEngine.from_pretrained(device="cpu")
    started = time.perf_counter()
    outcomes = engine.score(samples)
    seconds = time.perf_counter() - started
    single = []
    for sample in samples[:100]:
        started_one = time.perf_counter()
        engine.score([sample])
        single.append(time.perf_counter() - started_one)
    num_tokens = sum(getattr(outcome, "num_tokens", 0) for outcome in outcomes)
    return {
        "tokens_per_second": round(num_tokens / seconds),
        "single_p50_milliseconds": round(1_000 * statistics.median(single), 1),
    }


def measure_speed(pool: list[bytes], seconds: float) -> dict[str, Load]:
    with server():
        load(pool, num_clients=8, num_per_request=1, seconds=2)  # everybody's first calls
        return {
            "alone": load(pool, num_clients=1, num_per_request=1, seconds=seconds / 2),
            "one_a_request": load(
                pool, num_clients=NUM_CLIENTS, num_per_request=1, seconds=seconds
            ),
            "32_a_request": load(
                pool, num_clients=NUM_CLIENTS, num_per_request=32, seconds=2 * seconds
            ),
        }


def measure_overload(pool: list[bytes], seconds: float) -> dict[str, object]:
    """Four times as many samples at once as the queue takes; memory every second."""
    with server(max_queued_samples=NUM_CLIENTS) as parent:
        before = memory_megabytes(parent)
        peaks = [before]
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            settings = {
                "num_clients": OVERLOAD_CLIENTS, "num_per_request": 1, "seconds": seconds,
            }  # fmt: skip
            pending = processes.apply_async(run_crowd, (pool, settings))
            while not pending.ready():
                peaks.append(memory_megabytes(parent))
                pending.wait(1)
            seen = pending.get()
    return {
        "statuses": seen.statuses,
        "unanswered": seen.num_unanswered,
        "memory_megabytes": {"before": before, "half": peaks[len(peaks) // 2], "peak": max(peaks)},
    }


def measure_replicas(
    samples: list[Sample], pool: list[bytes], seconds: float
) -> dict[str, dict[str, float]]:
    """Tokens/s by the number of scorers, and by that of bare engines: what the cores allow."""
    served, bare = {}, {}
    for number in (1, 2):
        with server(num_replicas=number):
            load(pool, num_clients=8, num_per_request=4, seconds=2)
            seen = load(pool, num_clients=32, num_per_request=16, seconds=seconds)
            served[str(number)] = round(seen.tokens_per_second)
        with multiprocessing.get_context("spawn").Pool(number) as processes:
            speeds = processes.map(engine_speed, [(samples, seconds)] * number, chunksize=1)
            bare[str(number)] = round(sum(speeds))
    return {
        kind: {**found, "ratio": round(found["2"] / found["1"], 2)}
        for kind, found in (("served", served), ("bare_engines", bare))
    }


def engine_speed(arguments: tuple[list[Sample], float]) -> float:
    """Tokens/s of one engine that packs as a scorer does, over so many seconds."""
    samples, seconds = arguments
    torch.set_num_threads(1)
    engine = ScoringEngine.from_pretrained(device="cpu")
    engine.score(samples[:32])
    num_tokens, started = 0, time.perf_counter()
    for first in itertools.cycle(range(0, len(samples), 16)):
        rows = engine.tokenizer.tokenize(samples[first : first + 16])  # about a batch of a scorer
        outcomes = engine.score_tokenized(rows, packer=pad_samples_closely)
        num_tokens += sum(getattr(outcome, "num_tokens", 0) for outcome in outcomes)
        if time.perf_counter() - started > seconds:
            break
    return num_tokens / (time.perf_counter() - started)


def measure_all(samples: list[Sample], pool: list[bytes], seconds: float) -> dict[str, object]:
    engine = measure_engine(samples)
    seen = measure_speed(pool, seconds)
    speeds = {name: seen[name].tokens_per_second for name in ("one_a_request", "32_a_request")}
    return {
        "engine": engine,
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "share_of_the_engine": {
            name: round(speed / engine["tokens_per_second"], 2) for name, speed in speeds.items()
        },
        "p50_milliseconds": {name: found.p50_milliseconds for name, found in seen.items()},
        "alone_to_engine": round(
            seen["alone"].p50_milliseconds / engine["single_p50_milliseconds"], 2
        ),
        "statuses": {name: found.statuses for name, found in seen.items()},
        "overload": measure_overload(pool, 1.5 * seconds),
        "tokens_per_second_by_replicas": measure_replicas(samples, pool, seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DOLLY if DOLLY.is_file() else DEMO_CORPUS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, no result file")
    parser.add_argument("--only", choices=["replicas"], help="one part alone, no result file")
    args = parser.parse_args()
    seconds = 4.0 if args.quick else 40.0
    samples = [row for row in read_corpus(str(args.data)) if isinstance(row, Sample)][:600]
    pool = [wire(sample) for sample in samples]
    measure = measure_replicas if args.only else measure_all
    result = {**describe_run(), "corpus": args.data.name, **measure(samples, pool, seconds)}
    if args.quick or args.only:
        print(json.dumps(result, indent=1))
    else:
        write_result("bench_serve", result)


if __name__ == "__main__":
    with one_line_errors():
        main()
