"""Throughput, latency and memory of the service.

    python benchmarks/bench_serve.py [--data CORPUS]

In one run, on one machine: tokens/s of the bare engine on a pool of samples; 64 clients with 32
samples per request and with one; a single client; a load of four times the capacity, with the
memory of all server processes; one scorer replica against two, and one bare engine against two.
A separate process generates the load. `--only replicas` runs and prints only the last part.
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
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.process_memory import process_tree  # noqa: E402
from benchmarks.results import one_line_errors, report  # noqa: E402
from recipes.held_out_rows import messages_of, read_samples  # noqa: E402
from selectmoe.data.packing import pad_samples_closely  # noqa: E402
from selectmoe.paths import DEMO_CORPUS  # noqa: E402
from selectmoe.records import Sample  # noqa: E402
from selectmoe.scoring.engine import ScoringEngine  # noqa: E402

DOLLY = ROOT.parent / "shared" / "data" / "instructions" / "dolly.jsonl"
URL = "http://127.0.0.1:8000"
READY_SECONDS = 180
NUM_CLIENTS = 64
OVERLOAD_CLIENTS = 256  # four times the queue length of that run


@dataclass(frozen=True, slots=True)
class Load:
    """Responses that a number of concurrent clients received."""

    seconds: float
    num_samples: int
    num_tokens: int
    statuses: dict[str, int]
    num_unanswered: int
    p50_milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def encode(sample: Sample) -> bytes:
    """Encoded before the measurement, since clients and server share the cores."""
    return json.dumps({"messages": messages_of(sample)}).encode()


@dataclass(slots=True)
class LoadGenerator:
    """Concurrent clients; each sends its next request as soon as it has a response."""

    pool: list[bytes]
    num_clients: int
    num_per_request: int
    seconds: float
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    latencies: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_unanswered: int = 0

    async def run(self) -> Load:
        limits = httpx.Limits(
            max_connections=self.num_clients, max_keepalive_connections=self.num_clients
        )
        started = time.perf_counter()
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            deadline = started + self.seconds
            seeds = range(self.num_clients)
            await asyncio.gather(*(self.send_until(deadline, client, seed) for seed in seeds))
        latencies = self.latencies or [0.0]
        return Load(
            seconds=time.perf_counter() - started,
            num_samples=self.num_per_request * self.statuses[200],
            num_tokens=self.num_tokens,
            statuses={str(status): number for status, number in self.statuses.items()},
            num_unanswered=self.num_unanswered,
            p50_milliseconds=round(1_000 * statistics.median(latencies), 1),
        )

    async def send_until(self, deadline: float, client: httpx.AsyncClient, seed: int) -> None:
        choice = random.Random(seed)
        while time.perf_counter() < deadline:
            samples = choice.sample(self.pool, self.num_per_request)
            body = b'{"samples":[' + b",".join(samples) + b"]}"
            sent = time.perf_counter()
            try:
                response = await client.post(f"{URL}/score", content=body)
            except httpx.TransportError:
                self.num_unanswered += 1
                continue
            self.statuses[response.status_code] += 1
            if response.status_code == 200:
                self.latencies.append(time.perf_counter() - sent)
                self.num_tokens += response.json()["usage"]["tokens"]
            else:
                await asyncio.sleep(min(float(response.headers.get("Retry-After", 1)), 1.0))


def run_load(pool: list[bytes], settings: dict[str, float]) -> Load:
    return asyncio.run(LoadGenerator(pool, **settings).run())  # type: ignore[arg-type]


def load(pool: list[bytes], **settings: float) -> Load:
    """Generates load in a separate process, which does not slow this one's measurements."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(run_load, (pool, settings))


@contextlib.contextmanager
def server(**settings: object) -> Iterator[psutil.Process]:
    """Runs `serve run serve.app:app` with these SELECTMOE_* variables; yields when it is ready."""
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
    sys.exit("error: the server did not become ready; is port 8000 free?")


def memory_megabytes(parent: psutil.Process) -> int:
    """Private memory (USS) of all server processes, in MiB."""
    total = 0
    for process in process_tree(parent.pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total // 2**20


def measure_engine(samples: list[Sample]) -> dict[str, float]:
    """Tokens/s over the pool and median latency of one sample, single-threaded as in a replica."""
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
        load(pool, num_clients=8, num_per_request=1, seconds=2)  # warm-up
        return {
            "single_client": load(pool, num_clients=1, num_per_request=1, seconds=seconds / 2),
            "1_sample_per_request": load(
                pool, num_clients=NUM_CLIENTS, num_per_request=1, seconds=seconds
            ),
            "32_samples_per_request": load(
                pool, num_clients=NUM_CLIENTS, num_per_request=32, seconds=2 * seconds
            ),
        }


def measure_overload(pool: list[bytes], seconds: float) -> dict[str, object]:
    """Four times as many concurrent samples as fit in the queue; samples memory every second."""
    with server(max_queued_samples=NUM_CLIENTS) as parent:
        before = memory_megabytes(parent)
        peaks = [before]
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            settings = {
                "num_clients": OVERLOAD_CLIENTS, "num_per_request": 1, "seconds": seconds,
            }  # fmt: skip
            pending = processes.apply_async(run_load, (pool, settings))
            while not pending.ready():
                peaks.append(memory_megabytes(parent))
                pending.wait(1)
            overload = pending.get()
    return {
        "statuses": overload.statuses,
        "unanswered": overload.num_unanswered,
        "memory_megabytes": {"before": before, "half": peaks[len(peaks) // 2], "peak": max(peaks)},
    }


def measure_replicas(
    samples: list[Sample], pool: list[bytes], seconds: float
) -> dict[str, dict[str, float]]:
    """Tokens/s of one and two scorers, and of as many bare engines: the limit of the cores."""
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
        kind: {**speeds, "ratio": round(speeds["2"] / speeds["1"], 2)}
        for kind, speeds in (("served", served), ("bare_engines", bare))
    }


def engine_speed(arguments: tuple[list[Sample], float]) -> float:
    """Tokens/s over a number of seconds of one engine that forms batches as a scorer does."""
    samples, seconds = arguments
    torch.set_num_threads(1)
    engine = ScoringEngine.from_pretrained(device="cpu")
    engine.score(samples[:32])
    num_tokens, started = 0, time.perf_counter()
    for first in itertools.cycle(range(0, len(samples), 16)):
        rows = engine.tokenizer.tokenize(samples[first : first + 16])  # about one batch of a scorer
        outcomes = engine.score_tokenized(rows, packer=pad_samples_closely)
        num_tokens += sum(getattr(outcome, "num_tokens", 0) for outcome in outcomes)
        if time.perf_counter() - started > seconds:
            break
    return num_tokens / (time.perf_counter() - started)


def measure_all(samples: list[Sample], pool: list[bytes], seconds: float) -> dict[str, object]:
    engine = measure_engine(samples)
    loads = measure_speed(pool, seconds)
    single = loads["single_client"].p50_milliseconds
    speeds = {n: load.tokens_per_second for n, load in loads.items() if n != "single_client"}
    return {
        "engine": engine,
        "tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "fraction_of_engine": {
            name: round(speed / engine["tokens_per_second"], 2) for name, speed in speeds.items()
        },
        "p50_milliseconds": {name: load.p50_milliseconds for name, load in loads.items()},
        "single_client_over_engine": round(single / engine["single_p50_milliseconds"], 2),
        "statuses": {name: load.statuses for name, load in loads.items()},
        "overload": measure_overload(pool, 1.5 * seconds),
        "tokens_per_second_by_replicas": measure_replicas(samples, pool, seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DOLLY if DOLLY.is_file() else DEMO_CORPUS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; no result file")
    parser.add_argument("--only", choices=["replicas"], help="run one part; no result file")
    args = parser.parse_args()
    seconds = 4.0 if args.quick else 40.0
    samples = read_samples([str(args.data)])[:600]
    pool = [encode(sample) for sample in samples]
    measure = measure_replicas if args.only else measure_all
    measured = {"corpus": args.data.name, **measure(samples, pool, seconds)}
    report("bench_serve", measured, quick=args.quick or bool(args.only))


if __name__ == "__main__":
    with one_line_errors():
        main()
