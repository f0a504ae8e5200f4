"""Counters, gauges and histograms as plain numbers, so that those of several replicas add up."""

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve.batching import BatchObserver

PREFIX = "selectmoe_serve_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
TOKENS = (64, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)

Labels = tuple[tuple[str, str], ...]
# (name of the line, labels) -> value; one replica's numbers, or the sum of several.
Snapshot = dict[tuple[str, Labels], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is; `buckets` makes it a histogram."""

    kind: str
    help_text: str
    buckets: Sequence[float] = ()


METRICS = {
    "requests_total": Metric("counter", "Requests answered, by route and status."),
    "request_seconds": Metric("histogram", "Time from request to answer, by route.", SECONDS),
    "samples_total": Metric("counter", "Samples of requests, by outcome."),
    "tokens_total": Metric("counter", "Tokens that the model has read."),
    "queue_samples": Metric("gauge", "Samples that wait for a scorer now."),
    "accepted_samples": Metric("gauge", "Samples accepted and not yet answered."),
    "queue_wait_seconds": Metric("histogram", "Time of a sample in the queue.", SECONDS),
    "batch_samples": Metric("histogram", "Samples of a batch.", SIZES),
    "batch_tokens": Metric("histogram", "Tokens of a batch.", TOKENS),
    "batch_seconds": Metric("histogram", "Time of the model for a batch.", SECONDS),
    "batches_lost_total": Metric("counter", "Batches whose scorer died or was stuck."),
    "scorers_ready": Metric("gauge", "Scorer replicas that answered the last call of the roll."),
}


class MetricStore(BatchObserver):
    """The numbers of one ingress replica."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        # /metrics reads on another thread than requests write where Serve runs two loops.
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._values[name, tuple(labels.items())] += amount

    def set_gauge(self, name: str, value: float) -> None:
        with self._lock:
            self._values[name, ()] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        buckets = METRICS[name].buckets
        position = bisect_left(buckets, value)
        edge = str(buckets[position]) if position < len(buckets) else "+Inf"
        own = tuple(labels.items())
        with self._lock:
            self._values[f"{name}_bucket", (*own, ("le", edge))] += 1
            self._values[f"{name}_sum", own] += value
            self._values[f"{name}_count", own] += 1

    def snapshot(self) -> Snapshot:
        with self._lock:
            return dict(self._values)

    def batch_sent(self, *, num_samples: int, num_tokens: int, waits: Sequence[float]) -> None:
        self.observe("batch_samples", num_samples)
        self.observe("batch_tokens", num_tokens)
        for wait in waits:
            self.observe("queue_wait_seconds", wait)

    def batch_scored(self, *, num_samples: int, num_tokens: int, seconds: float) -> None:
        self.observe("batch_seconds", seconds)
        self.count("tokens_total", num_tokens)

    def batch_lost(self) -> None:
        self.count("batches_lost_total")


def add_up(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum over replicas; every ingress replica calls the same roll of scorers."""
    total: Snapshot = {}
    for snapshot in snapshots:
        for key, value in snapshot.items():
            if key[0] == "scorers_ready":
                total[key] = max(total.get(key, 0), value)
            else:
                total[key] = total.get(key, 0) + value
    return total


def prometheus_text(snapshot: Snapshot) -> str:
    """In Prometheus' text format 0.0.4; a metric without a value yet is only announced."""
    lines = []
    for name, metric in METRICS.items():
        lines += [
            f"# HELP {PREFIX}{name} {metric.help_text}",
            f"# TYPE {PREFIX}{name} {metric.kind}",
        ]
        values = _of_histogram(name, metric, snapshot) if metric.buckets else _of(name, snapshot)
        lines += [f"{PREFIX}{line}" for line in values]
    return "\n".join(lines) + "\n"


def _of(name: str, snapshot: Snapshot) -> list[str]:
    found = {labels: value for (line, labels), value in snapshot.items() if line == name}
    return [f"{name}{_braces(labels)} {value:.15g}" for labels, value in sorted(found.items())]


def _of_histogram(name: str, metric: Metric, snapshot: Snapshot) -> list[str]:
    lines = []
    owners = sorted(labels for line, labels in snapshot if line == f"{name}_count")
    for labels in owners:
        below = 0.0  # buckets are cumulative
        for edge in (*map(str, metric.buckets), "+Inf"):
            below += snapshot.get((f"{name}_bucket", (*labels, ("le", edge))), 0)
            lines.append(f"{name}_bucket{_braces((*labels, ('le', edge)))} {below:.15g}")
        lines.append(f"{name}_sum{_braces(labels)} {snapshot[f'{name}_sum', labels]:.6f}")
        lines.append(f"{name}_count{_braces(labels)} {snapshot[f'{name}_count', labels]:.15g}")
    return lines


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}"
