"""The result of an evaluation task: metrics with standard errors, and the values of samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selectmoe.records import RejectedRow

# The main metric of a task, which is shown in tables, is the first of these that it has.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "nll_per_token")


@dataclass(frozen=True, slots=True)
class MetricValue:
    """The value of one metric of a task."""

    value: float
    standard_error: float | None  # None where lm-eval has no estimate
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class SampleValues:
    """The contribution of one sample to the metrics of its task."""

    sample: str  # identifies the row; the same in every run
    values: dict[str, float]  # by metric
    weights: dict[str, float] = field(default_factory=dict)  # by metric; 1 where absent
    details: dict[str, Any] = field(default_factory=dict)  # the target and the model's responses


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of one task; a group of tasks has `subtasks` and no samples of its own."""

    task: str
    metrics: dict[str, MetricValue]
    num_samples: int
    num_left_out: dict[str, int] = field(default_factory=dict)  # by reason
    num_truncated: int = 0  # forward passes truncated on the left to fit the model
    num_fewshot: int = 0
    version: str | None = None
    subtasks: tuple[str, ...] = ()
    samples: tuple[SampleValues, ...] = ()
    seconds: float = 0.0
    rejected: tuple[RejectedRow, ...] = ()  # empty in a run that was read from its folder


def top_level(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Groups with metrics of their own, and the tasks that are in none of these."""
    inner = {subtask for result in results if result.metrics for subtask in result.subtasks}
    return [result for result in results if result.metrics and result.task not in inner]


def main_metric(names: Sequence[str]) -> str:
    """exact_match,strict-match counts as exact_match; without a known metric, the first."""
    for wanted in MAIN_METRICS:
        for name in names:
            if name.partition(",")[0] == wanted:
                return name
    return names[0]


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def influences(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The influence of each sample on the weighted mean; with equal weights, its deviation from it.

    Their standard error is that of the mean, by the delta method where weights are random too, as
    the lengths of answers are: in an average over tokens, the independent units are the samples.
    """
    influence: np.ndarray = weights * (values - weighted_mean(values, weights)) / weights.mean()
    return influence


def standard_error(influence: np.ndarray) -> float | None:
    """Standard error of a mean from the influences of its samples; None for a single sample."""
    num_samples = len(influence)
    if num_samples < 2:
        return None
    return float(math.sqrt(float((influence**2).sum()) / (num_samples - 1) / num_samples))


def aggregate(
    samples: Sequence[SampleValues], metric: str, *, higher_is_better: bool
) -> MetricValue:
    """A metric and its standard error from the values of its samples."""
    values, weights = sample_arrays(samples, metric)
    return MetricValue(
        value=weighted_mean(values, weights),
        standard_error=standard_error(influences(values, weights)),
        higher_is_better=higher_is_better,
    )


def sample_arrays(samples: Sequence[SampleValues], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, weights) of one metric; samples without it are skipped."""
    having = [sample for sample in samples if metric in sample.values]
    values = np.array([sample.values[metric] for sample in having], dtype=np.float64)
    weights = np.array([sample.weights.get(metric, 1.0) for sample in having], dtype=np.float64)
    return values, weights


def finite_numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    """The entries whose value is a finite number."""
    return {
        name: float(value)
        for name, value in entries.items()
        if isinstance(value, int | float | np.number) and math.isfinite(value)
    }
