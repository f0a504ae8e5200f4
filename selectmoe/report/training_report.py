"""report.html of a training run: its metrics by step and layer, from metrics.jsonl."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.data.writers import whole_file
from selectmoe.errors import DataError
from selectmoe.report import charts
from selectmoe.report.figures import Figure
from selectmoe.report.page import as_text, render_template
from selectmoe.report.selection_report import REPORT_NAME
from selectmoe.training.metrics_lines import LOSS_PARTS, METRICS_NAME

# Shape letters: S = logged steps.

NO_METRICS = ("step", "num_steps", "epoch")
BY_LAYER = re.compile(r"(.+)_layer_(\d+)$")
MOST_POINTS = 400  # of a line; of more steps every so many are drawn
MOST_TABLE_ROWS = 60
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Steps and values, float64 (S,) each, by name."""


def write_training_report(run: Path) -> Path:
    """Writes report.html into the folder of a finished run of stage 1 or 3; returns its path.

    Raises DataError where the run has no manifest or no metrics.
    """
    charts.require_matplotlib()
    manifest, rows = _read(run)
    config = manifest["config"]
    is_warmup = "training.quality_loss_type" in config
    last = rows[-1]
    page = render_template(
        "training.html.jinja",
        kicker="report of a gate warm-up" if is_warmup else "report of a finetuning run",
        title=f"Loss {last['loss']:.4f} after {last['step']:,} steps",
        sentence=_sentence(manifest, is_warmup=is_warmup),
        tiles=_tiles(manifest, rows),
        sections=_sections(rows),
        facts=_facts(manifest, run),
        settings=[(key, as_text(value)) for key, value in config.items()],
    )
    file = run / REPORT_NAME
    with whole_file(file) as target:
        target.write(page.encode("utf-8", "replace"))
    return file


def _read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manifest, metrics = run / "manifest.json", run / METRICS_NAME
    for file in (manifest, metrics):
        if not file.is_file():
            raise DataError(f"{run}: a report needs a finished run, with its {file.name}")
    lines = map(json.loads, metrics.read_text("utf-8").splitlines())
    rows = [row for row in lines if "step" in row]  # gates that are fitted to features have none
    if not rows:
        raise DataError(f"{metrics}: has no step")
    return json.loads(manifest.read_text("utf-8")), rows


def _sections(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Figure]]]:
    """Losses, other metrics, and metrics of each layer."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NO_METRICS))
    names = [name for name in names if _is_number(rows, name)]
    losses = {_words(name): _line(rows, name) for name in ("loss", *LOSS_PARTS) if name in names}
    layered: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    others = []
    for name in names:
        if found := BY_LAYER.match(name):
            layered.setdefault(found[1], {})[f"layer {int(found[2])}"] = _line(rows, name)
        elif _words(name) not in losses:
            others.append(_figure(_words(name), {_words(name): _line(rows, name)}))
    sections = [
        ("Loss", [_figure("loss", losses)] if losses else []),
        ("By layer", [_figure(f"{_words(key)} by layer", lines) for key, lines in layered.items()]),
        ("By step", others),
    ]
    return [(heading, figures) for heading, figures in sections if figures]


def _figure(title: str, series: Series) -> Figure:
    key = re.sub(r"\W+", "-", title)
    drawn = {name: _thinned(line, MOST_POINTS) for name, line in series.items()}
    unit = title.removesuffix(" by layer")
    svg = charts.lines(key, drawn, labels=("step", unit))
    columns = {
        name: dict(zip(*(part.tolist() for part in _thinned(line, MOST_TABLE_ROWS)), strict=True))
        for name, line in series.items()
    }
    steps = sorted({step for values in columns.values() for step in values})
    rows = [
        (f"{step:,.0f}", *(f"{v[step]:.4g}" if step in v else "" for v in columns.values()))
        for step in steps
    ]
    return Figure(key, title.capitalize(), "", svg, ("step", *series), rows)


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have the metric, and its values."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps_and_values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return steps_and_values[:, 0], steps_and_values[:, 1]


def _thinned(line: tuple[np.ndarray, np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, the last one among them."""
    count = len(line[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
    return line[0][chosen], line[1][chosen]


def _is_number(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def _words(name: str) -> str:
    return {"grad_norm": "gradient norm"}.get(name, name.replace("_", " "))


def _sentence(manifest: Mapping[str, Any], *, is_warmup: bool) -> str:
    rows = manifest["data"]
    what = "The quality gates were warmed up" if is_warmup else "An adapter was trained"
    return (
        f"{what} on {rows['num_rows']:,} rows, {rows['description']}, "
        f"in {manifest['num_steps']:,} steps."
    )


def _tiles(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    trained = manifest.get("num_parameters_trained", manifest.get("num_trained_parameters"))
    tiles = [
        ("rows", f"{manifest['data']['num_rows']:,}"),
        ("tokens of these", f"{manifest['data']['num_tokens']:,}"),
        ("steps", f"{manifest['num_steps']:,}"),
        ("trained parameters", f"{trained:,}" if trained is not None else ""),
        ("loss at the first logged step", f"{rows[0]['loss']:.4f}"),
        ("loss at the last step", f"{rows[-1]['loss']:.4f}"),
        ("seconds", f"{manifest['wall_seconds']:,.0f}"),
    ]
    return [(name, number) for name, number in tiles if number]


def _facts(manifest: Mapping[str, Any], run: Path) -> list[tuple[str, str]]:
    code = manifest["code"]
    version = f"{code['version']}, commit {code['commit']}" if "commit" in code else code["version"]
    return [
        ("run", run.name),
        ("model", str(manifest["model"])),
        ("rows", manifest["data"]["description"]),
        ("computed on", f"{manifest.get('device', '')} {manifest.get('dtype', '')}".strip()),
        ("selectmoe", version),
    ]
