"""Prometheus counters, gauges and histograms, summed over replicas."""

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PREFIX = "selectmoe_serve_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
TOKENS = (64, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)

Labels = tuple[tuple[str, str], ...]
# (name of the series, labels) -> value; of one replica, or summed over several.
Snapshot = dict[tuple[str, Labels], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """The description of a metric; one with `buckets` is a histogram."""

    kind: str
    help_text: str
    buckets: Sequence[float] = ()


METRICS = {
    "requests_total": Metric("counter", "Requests, by route and status."),
    "request_seconds": Metric("histogram", "Latency of a request, by route.", SECONDS),
    "samples_total": Metric("counter", "Samples of requests, by outcome."),
    "tokens_total": Metric("counter", "Tokens processed by the model."),
    "queue_samples": Metric("gauge", "Samples that wait for a scorer."),
    "accepted_samples": Metric("gauge", "Samples accepted and not answered yet."),
    "queue_wait_seconds": Metric("histogram", "Waiting time of a sample in the queue.", SECONDS),
    "batch_samples": Metric("histogram", "Samples per batch.", SIZES),
    "batch_tokens": Metric("histogram", "Tokens per batch.", TOKENS),
    "batch_seconds": Metric("histogram", "Time that the model takes for a batch.", SECONDS),
    "batches_lost_total": Metric("counter", "Batches whose scorer died or was stuck."),
    "scorers_ready": Metric("gauge", "Scorer replicas that passed the last health check."),
}


class MetricStore:
    """The metrics of one ingress replica."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        # With a separate loop for user code, Serve reads /metrics on another thread.
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
        bound = str(buckets[position]) if position < len(buckets) else "+Inf"
        key = tuple(labels.items())
        with self._lock:
            self._values[f"{name}_bucket", (*key, ("le", bound))] += 1
            self._values[f"{name}_sum", key] += value
            self._values[f"{name}_count", key] += 1

    def snapshot(self) -> Snapshot:
        with self._lock:
            return dict(self._values)


def sum_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum over replicas; of scorers_ready the maximum, since all count the same scorers."""
    total: Snapshot = {}
    for snapshot in snapshots:
        for key, value in snapshot.items():
            if key[0] == "scorers_ready":
                total[key] = max(total.get(key, 0), value)
            else:
                total[key] = total.get(key, 0) + value
    return total


def prometheus_text(snapshot: Snapshot) -> str:
    """Prometheus' text format 0.0.4; a metric without a value yet has only its two comments."""
    lines = []
    for name, metric in METRICS.items():
        lines += [
            f"# HELP {PREFIX}{name} {metric.help_text}",
            f"# TYPE {PREFIX}{name} {metric.kind}",
        ]
        format_series = _histogram_lines if metric.buckets else _value_lines
        lines += [f"{PREFIX}{line}" for line in format_series(name, snapshot)]
    return "\n".join(lines) + "\n"


def _value_lines(name: str, snapshot: Snapshot) -> list[str]:
    values = {labels: value for (series, labels), value in snapshot.items() if series == name}
    return [f"{name}{_braces(labels)} {value:.15g}" for labels, value in sorted(values.items())]


def _histogram_lines(name: str, snapshot: Snapshot) -> list[str]:
    lines = []
    for labels in sorted(labels for series, labels in snapshot if series == f"{name}_count"):
        total = 0.0  # buckets are cumulative
        for bound in (*map(str, METRICS[name].buckets), "+Inf"):
            total += snapshot.get((f"{name}_bucket", (*labels, ("le", bound))), 0)
            lines.append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {total:.15g}")
        lines.append(f"{name}_sum{_braces(labels)} {snapshot[f'{name}_sum', labels]:.6f}")
        lines.append(f"{name}_count{_braces(labels)} {snapshot[f'{name}_count', labels]:.15g}")
    return lines


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}"
