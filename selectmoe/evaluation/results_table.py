"""Compares finished runs: a table with a row per run, and the differences to a baseline."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.data.writers import whole_file, write_json
from selectmoe.errors import ConfigError
from selectmoe.evaluation.run_files import EvaluationRun
from selectmoe.evaluation.task_results import (
    SampleValues,
    influences,
    main_metric,
    sample_arrays,
    standard_error,
    top_level,
    weighted_mean,
)

TABLE_NAME = "results_table"
# Tolerance within which the mean of the stored values is the stored metric, up to rounding.
SAME_MEAN = 1e-6


@dataclass(frozen=True, slots=True)
class Difference:
    """The metric of a run minus that of the baseline."""

    value: float
    standard_error: float | None
    paired: bool  # computed sample by sample, on the same samples


@dataclass(frozen=True, slots=True)
class Cell:
    """The metric of one run on one task."""

    value: float
    standard_error: float | None
    num_samples: int
    difference: Difference | None  # None for the baseline itself, or without a baseline


@dataclass(frozen=True, slots=True)
class Column:
    """A task and its main metric."""

    task: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class ResultsTable:
    """Cells by run and column; None where a run does not include a task."""

    baseline: str | None
    columns: tuple[Column, ...]
    rows: dict[str, tuple[Cell | None, ...]]
    folders: dict[str, Path]


def compare_runs(runs: Sequence[EvaluationRun], *, baseline: str) -> ResultsTable:
    """Raises ConfigError if two runs have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            same = ", ".join(str(other.folder) for other in runs if other.name == run.name)
            raise ConfigError(f"names of runs must be unique, got {run.name!r} for {same}")
    columns = _columns(runs)
    base = next((run for run in runs if run.name == baseline), None)
    return ResultsTable(
        baseline=base.name if base else None,
        columns=columns,
        rows={run.name: tuple(_cell(run, base, column) for column in columns) for run in runs},
        folders={run.name: run.folder for run in runs},
    )


def difference(
    run: EvaluationRun, baseline: EvaluationRun, task: str, metric: str
) -> Difference | None:
    """Paired if both runs have the same samples, so that the difficulty of a sample cancels out."""
    ours, theirs = run.result(task), baseline.result(task)
    if (
        ours is None
        or theirs is None
        or not {metric} <= ours.metrics.keys() & theirs.metrics.keys()
    ):
        return None
    value = ours.metrics[metric].value - theirs.metrics[metric].value
    influence = [
        _influence_by_sample(each.samples(task), metric, result.metrics[metric].value)
        for each, result in ((run, ours), (baseline, theirs))
    ]
    if influence[0] and influence[1] and influence[0].keys() == influence[1].keys():
        paired = np.array([own - influence[1][sample] for sample, own in influence[0].items()])
        return Difference(value, standard_error(paired), paired=True)
    errors = [result.metrics[metric].standard_error for result in (ours, theirs)]
    known = [error for error in errors if error is not None]
    unpaired = math.hypot(*known) if len(known) == len(errors) else None
    return Difference(value, unpaired, paired=False)


def write_table(table: ResultsTable, folder: Path) -> tuple[Path, Path]:
    """Writes results_table.json and results_table.md; returns both paths."""
    as_json, as_markdown = folder / f"{TABLE_NAME}.json", folder / f"{TABLE_NAME}.md"
    write_json(as_json, to_json(table))
    with whole_file(as_markdown) as file:
        file.write(to_markdown(table).encode("utf-8"))
    return as_json, as_markdown


def to_json(table: ResultsTable) -> dict[str, Any]:
    return {
        "baseline": table.baseline,
        "columns": [asdict(column) for column in table.columns],
        "rows": [
            {
                "run": name,
                "folder": str(table.folders[name]),
                "cells": [None if cell is None else asdict(cell) for cell in cells],
            }
            for name, cells in table.rows.items()
        ],
    }


def to_text(table: ResultsTable) -> str:
    """The table with aligned columns, for a terminal."""
    rows = _cell_texts(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(table)]) + "\n"


def to_markdown(table: ResultsTable) -> str:
    header, *rows = _cell_texts(table)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + "\n\n" + "\n".join(_notes(table)) + "\n"


def _columns(runs: Sequence[EvaluationRun]) -> tuple[Column, ...]:
    """Every task of any run, in order of first appearance; a group with metrics hides its tasks."""
    columns: dict[str, Column] = {}
    for run in runs:
        for result in top_level(run.results):
            if result.task in columns:
                continue
            metric = main_metric(list(result.metrics))
            better = result.metrics[metric].higher_is_better
            columns[result.task] = Column(result.task, metric, better)
    return tuple(columns.values())


def _cell(run: EvaluationRun, baseline: EvaluationRun | None, column: Column) -> Cell | None:
    result = run.result(column.task)
    if result is None or column.metric not in result.metrics:
        return None
    metric = result.metrics[column.metric]
    to_baseline = None
    if baseline is not None and baseline is not run:
        to_baseline = difference(run, baseline, column.task, column.metric)
    return Cell(metric.value, metric.standard_error, result.num_samples, to_baseline)


def _influence_by_sample(
    samples: Sequence[SampleValues], metric: str, value: float
) -> dict[str, float]:
    """Empty if the metric is not a mean over samples (F1, perplexity)."""
    having = [sample for sample in samples if metric in sample.values]
    if not having:
        return {}
    values, weights = sample_arrays(having, metric)
    if not math.isclose(
        weighted_mean(values, weights), value, rel_tol=SAME_MEAN, abs_tol=SAME_MEAN
    ):
        return {}
    influence = influences(values, weights).tolist()
    return dict(zip((sample.sample for sample in having), influence, strict=True))


def _cell_texts(table: ResultsTable) -> list[list[str]]:
    titles = [f"{column.task} {column.metric}" for column in table.columns]
    rows = [["run", *titles]]
    for name, cells in table.rows.items():
        rows.append([name, *(_cell_text(cell) for cell in cells)])
    return rows


def _cell_text(cell: Cell | None) -> str:
    """0.2750 ± 0.0409 (+0.0083 ± 0.0143)"""
    if cell is None:
        return "-"
    text = _with_error(f"{cell.value:.4f}", cell.standard_error)
    if cell.difference is None:
        return text
    difference_text = _with_error(f"{cell.difference.value:+.4f}", cell.difference.standard_error)
    return f"{text} ({difference_text}{'' if cell.difference.paired else ', unpaired'})"


def _with_error(number: str, error: float | None) -> str:
    return number if error is None else f"{number} ± {error:.4f}"


def _notes(table: ResultsTable) -> list[str]:
    """The legend of the table."""
    lower = [column.task for column in table.columns if not column.higher_is_better]
    notes = ["± one standard error"]
    if table.baseline is not None:
        notes.append(f"in parentheses: paired difference to {table.baseline}")
    if lower:
        notes.append(f"lower is better for {', '.join(lower)}")
    return ["; ".join(notes) + "."]
