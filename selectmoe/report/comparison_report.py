"""report.html of a comparison of evaluated models: each task's metric with its interval."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.data.writers import whole_file
from selectmoe.errors import DataError
from selectmoe.report import charts
from selectmoe.report.figures import Figure
from selectmoe.report.page import as_text, render_template
from selectmoe.report.page_text import shortened
from selectmoe.report.selection_report import REPORT_NAME

TABLE_FILE = "results_table.json"


def write_comparison_report(folder: Path) -> Path:
    """Writes report.html beside results_table.json; returns its path.

    Raises DataError where there is no such table.
    """
    charts.require_matplotlib()
    file = folder / TABLE_FILE
    if not file.is_file():
        raise DataError(f"{folder}: a report needs {TABLE_FILE}")
    table = json.loads(file.read_text("utf-8"))
    settings = folder / "config.json"
    config = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    figures = [_value_figure(table, number) for number in range(len(table["columns"]))]
    sections = [("Differences", _difference_figures(table)), ("Tasks", figures)]
    baseline = table["baseline"]
    against = f", each against {baseline}" if baseline else ""
    page = render_template(
        "training.html.jinja",
        kicker="report of a comparison",
        title=f"{len(table['rows'])} runs on {len(table['columns'])} tasks",
        sentence=f"The metrics of {len(table['rows'])} evaluated runs{against}, with intervals of "
        "95 % (1.96 standard errors).",
        tiles=[],
        sections=[entry for entry in sections if entry[1]],
        facts=[(row["run"], row["folder"]) for row in table["rows"]],
        settings=[(key, as_text(value)) for key, value in config.items()],
    )
    report = folder / REPORT_NAME
    with whole_file(report) as target:
        target.write(page.encode("utf-8", "replace"))
    return report


def _value_figure(table: Mapping[str, Any], number: int) -> Figure:
    """A task's metric for each run that has it."""
    column, baseline = table["columns"][number], table["baseline"]
    cells = _cells(table, number)
    line = cells[baseline]["value"] if baseline in cells else None
    note = f"{_metric(column)}." + (f" The dashed line is {baseline}." if line is not None else "")
    return _intervals(f"task-{number}", column["task"], note, cells, line)


def _difference_figures(table: Mapping[str, Any]) -> list[Figure]:
    """The differences to the baseline, whose errors are smaller where they are paired."""
    figures = []
    for number, column in enumerate(table["columns"]):
        differences = {
            name: cell["difference"] | {"num_samples": cell["num_samples"]}
            for name, cell in _cells(table, number).items()
            if cell["difference"]
        }
        if differences:
            paired = all(difference["paired"] for difference in differences.values())
            how = ", sample by sample" if paired else ""
            note = f"{_metric(column)}; each run minus {table['baseline']}{how}."
            title = f"{column['task']}: difference to {table['baseline']}"
            figures.append(_intervals(f"difference-{number}", title, note, differences, 0.0))
    return figures


def _cells(table: Mapping[str, Any], number: int) -> dict[str, Mapping[str, Any]]:
    return {row["run"]: row["cells"][number] for row in table["rows"] if row["cells"][number]}


def _metric(column: Mapping[str, Any]) -> str:
    better = "higher is better" if column["higher_is_better"] else "lower is better"
    return f"{column['metric']}, {better}"


def _intervals(
    key: str, title: str, note: str, cells: Mapping[str, Mapping[str, Any]], line: float | None
) -> Figure:
    errors = [cell["standard_error"] for cell in cells.values()]
    svg = charts.intervals(
        key,
        [shortened(name, 22) for name in cells],
        np.array([cell["value"] for cell in cells.values()]),
        np.array(errors, dtype=np.float64),
        baseline=line,
    )
    rows = [
        (name, _number(cell["value"]), _number(error), f"{cell['num_samples']:,}")
        for (name, cell), error in zip(cells.items(), errors, strict=True)
    ]
    return Figure(key, title, note, svg, ("run", "value", "standard error", "samples"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
