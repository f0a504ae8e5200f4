"""The page of a report: what the template shows of the manifest, the figures and the examples."""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from selectmoe.data.rejected import rejected_file
from selectmoe.report.examples import GROUPS, Example
from selectmoe.report.figures import Figure
from selectmoe.report.page_text import (
    NUM_LEVELS,
    ShownText,
    level_edges,
    printable,
    shortened,
    shown_text,
)
from selectmoe.report.reproduction import MANY_PATHS, MOST_PATHS, command
from selectmoe.scoring.calibration import Calibration
from selectmoe.selection.finished_rule import selection_of_run
from selectmoe.selection.outputs import shorten_source
from selectmoe.selection.rule_text import describe_rule

TEMPLATES = Path(__file__).parent / "templates"
MOST_REJECTED_LINES = 50_000  # of rejected.jsonl that are read for examples
MOST_SETTING_CHARACTERS = 1_000  # as of a list of thousands of paths
REJECTED_EXAMPLES = 3  # of each reason


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportContent:
    """What is known of a run."""

    run: Path
    manifest: Mapping[str, Any]
    score_figures: Sequence[Figure]
    share_figures: Sequence[Figure]
    examples: Mapping[str, Sequence[Example]]
    why_no_tokens: str  # why tokens have no scores; empty where they have
    calibration: Calibration | None
    duplicates: Sequence[Mapping[str, str]]  # dataset, id and source of the first ones


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One row as the template shows it."""

    score: str
    facts: list[tuple[str, str]]
    text: ShownText


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """Rejected rows with one reason, with the first of them."""

    reason: str
    num_rows: int
    examples: list[str]


def render(content: ReportContent, *, started: float) -> str:
    """The whole page. started: of `time.perf_counter`, when work on the report began."""
    manifest, examples = content.manifest, content.examples
    levels = level_edges(
        piece.score
        for rows in examples.values()
        for row in rows
        for piece in row.pieces
        if piece.score is not None
    )
    folders = manifest.get("files", {}).get("folders", [])
    shown = {
        name: [_shown(example, levels, content.calibration, folders) for example in rows]
        for name, rows in examples.items()
    }
    config = manifest["config"]
    return render_template(
        "selection.html.jinja",
        title=title(manifest),
        sentence=sentence(manifest),
        tiles=tiles(manifest),
        warnings=manifest.get("warnings", []),
        knows_warnings="warnings" in manifest,
        score_figures=content.score_figures,
        share_figures=content.share_figures,
        groups=[(GROUPS[name], name, rows) for name, rows in shown.items() if rows],
        has_tokens=not content.why_no_tokens,
        why_no_tokens=content.why_no_tokens,
        level_numbers=range(NUM_LEVELS),
        lowest=_inside(levels[0]),
        highest=_inside(levels[-1]),
        is_adjusted=manifest["scoring"].get("length") == "adjusted",
        duplicates=[
            (
                shortened(row["id"], 80),
                shortened(row["dataset"], 80),
                shortened(shorten_source(row["source"], folders), 160),
            )
            for row in content.duplicates
        ],
        num_duplicates=manifest["total"].get("num_duplicates", 0),
        are_left_out=bool(manifest["total"].get("num_left_out", 0)),
        rejected=rejected_reasons(manifest, content.run),
        rejected_file=rejected_file(Path(".")).as_posix(),
        command=command(config),
        num_paths=len(config.get("dataset.paths") or ()),
        most_paths=MOST_PATHS,
        many_paths=MANY_PATHS,
        settings=[(key, as_text(value)) for key, value in config.items()],
        facts=facts(manifest, content.run),
        seconds=f"{time.perf_counter() - started:.1f}",
    )


def title(manifest: Mapping[str, Any]) -> str:
    total = manifest["total"]
    return f"{total['num_selected']:,} of {total['num_scored']:,} rows kept"


def sentence(manifest: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    total, selection = manifest["total"], selection_of_run(manifest)
    thresholds = manifest["thresholds"]
    kept = f"{total['num_selected']:,} of {total['num_scored']:,} scored rows are kept"
    rule = describe_rule(selection, num_datasets=len(thresholds))
    scores = [threshold["score"] for threshold in thresholds.values() if "score" in threshold]
    if not scores:
        return f"{rule}: {kept}."
    low, high = f"{min(scores):.4f}", f"{max(scores):.4f}"
    limit = f"score {low}" if low == high else f"scores {low} to {high}"
    return f"{rule}: {kept}, from {limit} upwards{_percentile(manifest)}."


def _percentile(manifest: Mapping[str, Any]) -> str:
    found = [threshold.get("percentile") for threshold in manifest["thresholds"].values()]
    percentiles = [percentile for percentile in found if percentile is not None]
    if not percentiles or not manifest.get("calibration"):
        return ""
    low, high = f"{min(percentiles):.1f}", f"{max(percentiles):.1f}"
    which = f"percentile {low}" if low == high else f"percentiles {low} to {high}"
    num_samples = manifest["calibration"]["num_samples"]
    return f", {which} of {num_samples:,} rows of the warm-up corpus"


def tiles(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that matter, each with its name."""
    total = manifest["total"]
    median = manifest.get("median_answer_tokens") or {}
    counts = [
        ("rows read", f"{total['num_read']:,}"),
        ("rows scored", f"{total['num_scored']:,}"),
        ("rows kept", f"{total['num_selected']:,}"),
        ("rows rejected", f"{total['num_rejected']:,}"),
        ("exact duplicates left out", f"{total.get('num_left_out', 0):,}"),
        ("rows truncated", f"{total['num_truncated']:,}"),
        ("tokens read by the model", f"{total['num_tokens']:,}"),
    ]
    if median.get("scored") is not None and median.get("selected") is not None:
        counts += [
            ("median answer tokens, all", f"{median['scored']:,g}"),
            ("median answer tokens, kept", f"{median['selected']:,g}"),
        ]
    return counts


def facts(manifest: Mapping[str, Any], run: Path) -> list[tuple[str, str]]:
    """Model, code and machine."""
    scoring, code = manifest["scoring"], manifest["code"]
    paths = manifest["config"].get("dataset.paths") or ["the demo corpus of the package"]
    more = f" and {len(paths) - MOST_PATHS:,} more paths" if len(paths) > MOST_PATHS else ""
    version = f"{code['version']}, commit {code['commit']}" if "commit" in code else code["version"]
    return [
        ("run", run.name),
        ("corpus", ", ".join(map(str, paths[:MOST_PATHS])) + more),
        ("selector", str(scoring["model"])),
        ("SHA-256 of its weights", scoring["weights_sha256"]),
        ("scores", f"{scoring['length']} for answer length" if "length" in scoring else "raw"),
        ("computed on", f"{scoring.get('device', '')} {scoring.get('dtype', '')}".strip()),
        ("tokens per second", f"{scoring['tokens_per_second']:,.0f}"),
        ("selectmoe", version),
    ]


def rejected_reasons(manifest: Mapping[str, Any], run: Path) -> list[RejectedReason]:
    """By reason, most rows first."""
    counts: dict[str, int] = {}
    for dataset in manifest["datasets"].values():
        for reason, number in dataset["num_rejected"].items():
            counts[reason] = counts.get(reason, 0) + number
    examples = _rejected_examples(rejected_file(run), set(counts))
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [RejectedReason(reason, number, examples[reason]) for reason, number in ordered]


def _rejected_examples(file: Path, reasons: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {reason: [] for reason in reasons}
    missing = REJECTED_EXAMPLES * len(reasons)
    if not missing or not file.is_file():
        return found
    with file.open(encoding="utf-8") as lines:
        for _, line in zip(range(MOST_REJECTED_LINES), lines, strict=False):
            row = json.loads(line)
            examples = found.get(row["reason"])
            if examples is not None and len(examples) < REJECTED_EXAMPLES:
                place = f"{Path(row['file']).name}:{row['row']}"
                examples.append(shortened(f"{place}: {row['detail']}", 300))
                missing -= 1
            if not missing:
                break
    return found


def _shown(
    example: Example, levels: np.ndarray, calibration: Calibration | None, folders: Sequence[str]
) -> ShownExample:
    sample, found = example.sample, example.found
    listed = [("dataset", shortened(sample.dataset, 80)), ("id", shortened(sample.sample_id, 120))]
    if sample.source:
        listed.append(("source", shortened(shorten_source(sample.source, folders), 160)))
    if calibration is not None:
        listed.insert(0, ("percentile", f"{calibration.percentile(found.score):.1f}"))
    return ShownExample(
        _inside(found.score, decimals=4), listed, shown_text(example.pieces, levels)
    )


def _inside(score: float, *, decimals: int = 3) -> str:
    """A score in (0, 1), with three more decimals where these would make it 0 or 1."""
    short = f"{score:.{decimals}f}"
    return f"{score:.{decimals + 3}f}" if float(short) in (0, 1) else short


def as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, MOST_SETTING_CHARACTERS)


def render_template(name: str, **values: object) -> str:
    """A template of this folder as a page; texts among the values are escaped."""
    style = Markup((TEMPLATES / "report.css").read_text("utf-8"))
    return _environment().get_template(name).render(style=style, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # what a corpus says is never read as HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
