"""One table over finished runs: a row a run, a column a task, and the difference to a baseline."""

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
    shown,
    standard_error,
    weighted_mean,
)

TABLE_NAME = "results_table"
# A mean of the stored values that is this near to the stored metric is that metric, rounded.
SAME_MEAN = 1e-6


@dataclass(frozen=True, slots=True)
class Difference:
    """A run's metric less the baseline's."""

    value: float
    standard_error: float | None
    paired: bool  # taken over the same samples, one by one


@dataclass(frozen=True, slots=True)
class Cell:
    """One run's metric on one task."""

    value: float
    standard_error: float | None
    num_samples: int
    difference: Difference | None  # None for the baseline itself, or where there is none


@dataclass(frozen=True, slots=True)
class Column:
    """A task, and the metric that stands for it."""

    task: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class ResultsTable:
    """Cells by run and column; None where a run has not done a task."""

    baseline: str | None
    columns: tuple[Column, ...]
    rows: dict[str, tuple[Cell | None, ...]]
    folders: dict[str, Path]


def compare_runs(runs: Sequence[EvaluationRun], *, baseline: str) -> ResultsTable:
    """Raises ConfigError where two runs have one name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            same = ", ".join(str(other.folder) for other in runs if other.name == run.name)
            raise ConfigError(f"runs must have names of their own, got {run.name!r} twice: {same}")
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
    """Paired where both runs have the same samples: what is hard for both then cancels out."""
    ours, theirs = run.result(task), baseline.result(task)
    if (
        ours is None
        or theirs is None
        or not {metric} <= ours.metrics.keys() & theirs.metrics.keys()
    ):
        return None
    value = ours.metrics[metric].value - theirs.metrics[metric].value
    pulls = [
        _pulls(each.samples(task), metric, result.metrics[metric].value)
        for each, result in ((run, ours), (baseline, theirs))
    ]
    if pulls[0] and pulls[1] and pulls[0].keys() == pulls[1].keys():
        paired = np.array([pull - pulls[1][sample] for sample, pull in pulls[0].items()])
        return Difference(value, standard_error(paired), paired=True)
    errors = [result.metrics[metric].standard_error for result in (ours, theirs)]
    known = [error for error in errors if error is not None]
    apart = math.hypot(*known) if len(known) == len(errors) else None
    return Difference(value, apart, paired=False)


def write_table(table: ResultsTable, folder: Path) -> tuple[Path, Path]:
    """Writes results_table.json and results_table.md; returns both."""
    as_json, as_markdown = folder / f"{TABLE_NAME}.json", folder / f"{TABLE_NAME}.md"
    write_json(as_json, table_content(table))
    with whole_file(as_markdown) as file:
        file.write(markdown(table).encode("utf-8"))
    return as_json, as_markdown


def table_content(table: ResultsTable) -> dict[str, Any]:
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


def plain(table: ResultsTable) -> str:
    """For a terminal: columns side by side."""
    rows = _texts(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(table)]) + "\n"


def markdown(table: ResultsTable) -> str:
    header, *rows = _texts(table)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + "\n\n" + "\n".join(_notes(table)) + "\n"


def _columns(runs: Sequence[EvaluationRun]) -> tuple[Column, ...]:
    """Every task of any run, in the order of the runs; of a group with a number, only it."""
    columns: dict[str, Column] = {}
    for run in runs:
        for result in shown(run.results):
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
    apart = None
    if baseline is not None and baseline is not run:
        apart = difference(run, baseline, column.task, column.metric)
    return Cell(metric.value, metric.standard_error, result.num_samples, apart)


def _pulls(samples: Sequence[SampleValues], metric: str, value: float) -> dict[str, float]:
    """Each sample's influence; empty where the metric is no mean over samples (F1, perplexity)."""
    having = [sample for sample in samples if metric in sample.values]
    if not having:
        return {}
    values, weights = sample_arrays(having, metric)
    if not math.isclose(
        weighted_mean(values, weights), value, rel_tol=SAME_MEAN, abs_tol=SAME_MEAN
    ):
        return {}
    pulls = influences(values, weights).tolist()
    return dict(zip((sample.sample for sample in having), pulls, strict=True))


def _texts(table: ResultsTable) -> list[list[str]]:
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
    apart = _with_error(f"{cell.difference.value:+.4f}", cell.difference.standard_error)
    return f"{text} ({apart}{'' if cell.difference.paired else ', unpaired'})"


def _with_error(number: str, error: float | None) -> str:
    return number if error is None else f"{number} ± {error:.4f}"


def _notes(table: ResultsTable) -> list[str]:
    """What a reader of the table needs to know."""
    lower = [column.task for column in table.columns if not column.higher_is_better]
    notes = ["± is one standard error"]
    if table.baseline is not None:
        notes.append(f"in brackets the difference to {table.baseline}, sample by sample")
    if lower:
        notes.append(f"lower is better for {', '.join(lower)}")
    return ["; ".join(notes) + "."]
