"""Writes and reads the files of an evaluation run; results.json marks it as complete."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectmoe.data.rejected import write_rejected
from selectmoe.data.writers import write_json, write_jsonl
from selectmoe.errors import ConfigError, DataError
from selectmoe.evaluation.task_results import MetricValue, SampleValues, TaskResult, main_metric

RESULTS_NAME = "results.json"
SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """A finished run, read from its folder."""

    name: str
    folder: Path
    model: str
    adapter: str | None
    results: tuple[TaskResult, ...]

    def result(self, task: str) -> TaskResult | None:
        return next((result for result in self.results if result.task == task), None)

    def samples(self, task: str) -> tuple[SampleValues, ...]:
        """The samples of a task, or of all tasks in a group."""
        result = self.result(task)
        if result is None:
            return ()
        own = tuple(
            SampleValues(f"{task}:{s.sample}", s.values, s.weights, s.details)
            for s in result.samples
        )
        return own + tuple(s for subtask in result.subtasks for s in self.samples(subtask))


def write_run(
    folder: Path, *, name: str, about: Mapping[str, object], results: Sequence[TaskResult]
) -> Path:
    """Writes the files; returns the path of results.json. about: its other entries."""
    write_jsonl(
        folder / SAMPLES_NAME,
        (
            {"task": result.task, **asdict(sample)}
            for result in results
            for sample in result.samples
        ),
    )
    write_rejected((row for result in results for row in result.rejected), folder)
    tasks = {result.task: _to_json(result) for result in results}
    write_json(folder / RESULTS_NAME, {"name": name, **about, "tasks": tasks})
    return folder / RESULTS_NAME


def read_run(folder: Path) -> EvaluationRun:
    """Raises ConfigError if the folder contains no finished run, DataError for broken files."""
    file = folder / RESULTS_NAME
    if not file.is_file():
        raise ConfigError(f"{folder} is not a finished evaluation run: it has no {RESULTS_NAME}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples = _read_samples(folder / SAMPLES_NAME)
        results = tuple(
            _result(task, entry, samples.get(task, [])) for task, entry in content["tasks"].items()
        )
        return EvaluationRun(content["name"], folder, content["model"], content["adapter"], results)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: cannot read its evaluation results: {error!r}") from error


def _to_json(result: TaskResult) -> dict[str, Any]:
    entries = asdict(result)
    del entries["task"], entries["samples"], entries["rejected"]
    return {**entries, "main_metric": main_metric(list(result.metrics)) if result.metrics else None}


def _read_samples(file: Path) -> dict[str, list[SampleValues]]:
    samples: dict[str, list[SampleValues]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            samples.setdefault(row.pop("task"), []).append(SampleValues(**row))
    return samples


def _result(task: str, entry: dict[str, Any], samples: list[SampleValues]) -> TaskResult:
    rest = {key: value for key, value in entry.items() if key not in ("metrics", "main_metric")}
    metrics = {name: MetricValue(**metric) for name, metric in entry["metrics"].items()}
    rest["subtasks"] = tuple(rest["subtasks"])
    return TaskResult(task=task, metrics=metrics, samples=tuple(samples), **rest)
