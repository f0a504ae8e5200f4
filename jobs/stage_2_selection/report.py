"""The manifest of a selection run, and the table that a person reads."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.stage_2_selection.score_corpus import ScoringReport
from selectmoe import __version__
from selectmoe.cli.progress import format_seconds
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.data.writers import write_json
from selectmoe.scoring.calibration import described
from selectmoe.selection.outputs import ALL_DATASETS, SelectedData

DEMO_BAD = "demo_corrupted"


def write_manifest(
    config: SelectConfig,
    output: Path,
    selected: SelectedData,
    scoring: ScoringReport | None,
    *,
    wall_seconds: float,
) -> dict[str, Any]:
    """Writes `manifest.json`, last of all files: where it is, the run is complete."""
    scored_by = asdict(scoring) if scoring else _manifest_of(Path(str(config.scored)))["scoring"]
    manifest = {
        "selectmoe_version": __version__,
        "config": resolved(config),
        "scoring": scored_by,
        "datasets": {name: asdict(counts) for name, counts in selected.counts.items()},
        "total": total_counts(selected),
        "thresholds": thresholds(selected),
        "calibration": described(selected.calibration) if selected.calibration else None,
        "score_quantiles": selected.quantiles,
        "wall_seconds": round(wall_seconds, 3),
    }
    write_json(output / "manifest.json", manifest)
    return manifest


def thresholds(selected: SelectedData) -> dict[str, dict[str, Any]]:
    """The cuts, each with the percentile of its score; null without a calibration."""
    calibration = selected.calibration
    return {
        name: asdict(cut)
        | {"percentile": calibration.percentile(cut.score) if calibration else None}
        for name, cut in selected.cuts.items()
    }


def total_counts(selected: SelectedData) -> dict[str, int]:
    counts = selected.counts.values()
    return {
        "num_read": sum(c.num_read for c in counts),
        "num_scored": sum(c.num_scored for c in counts),
        "num_rejected": sum(sum(c.num_rejected.values()) for c in counts),
        "num_selected": sum(c.num_selected for c in counts),
        "num_tokens": sum(c.num_tokens for c in counts),
        "num_truncated": sum(c.num_truncated for c in counts),
    }


def print_table(manifest: dict[str, Any], output: Path) -> None:
    """One line a data set, what the run took, and where its files are."""
    rows = [("data set", "read", "scored", "rejected", "selected", "threshold")]
    for name, counts in manifest["datasets"].items():
        rejected = sum(counts["num_rejected"].values())
        rows.append(_row(name, counts, rejected, _threshold(manifest, name)))
    total = manifest["total"]
    rows.append(_row("all", total, total["num_rejected"], _threshold(manifest, ALL_DATASETS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells))
    print()
    if DEMO_BAD in manifest["datasets"]:
        print(_demo_line(manifest["datasets"][DEMO_BAD], total))
    if manifest["calibration"]:
        print(_percentile_line(manifest))
    truncated = f", {total['num_truncated']:,} rows truncated" if total["num_truncated"] else ""
    print(
        f"{total['num_tokens']:,} tokens{truncated}, scored at "
        f"{manifest['scoring']['tokens_per_second']:,.0f} tokens/s; "
        f"{format_seconds(manifest['wall_seconds'])} in all"
    )
    for name in ("selected_data.jsonl", "rejected/rejected.jsonl", "scored/", "manifest.json"):
        if (output / name).exists():
            print(output / name)


def _row(
    name: str, counts: dict[str, Any], num_rejected: int, threshold: str
) -> tuple[str, str, str, str, str, str]:
    read, scored, selected = (
        f"{counts[key]:,}" for key in ("num_read", "num_scored", "num_selected")
    )
    return name, read, scored, f"{num_rejected:,}", selected, threshold


def _threshold(manifest: dict[str, Any], name: str) -> str:
    cut = manifest["thresholds"].get(name)
    return f"{cut['score']:.4f}" if cut else ""


def _percentile_line(manifest: dict[str, Any]) -> str:
    percentiles = [cut["percentile"] for cut in manifest["thresholds"].values()]
    lowest, highest = f"{min(percentiles):.1f}", f"{max(percentiles):.1f}"
    place = f" {lowest}" if lowest == highest else f"s {lowest} to {highest}"
    num_samples = manifest["calibration"]["num_samples"]
    return f"threshold at percentile{place} of {num_samples:,} rows of the warm-up corpus"


def _demo_line(bad: dict[str, Any], total: dict[str, int]) -> str:
    expected = bad["num_scored"] * total["num_selected"] / total["num_scored"]
    return (
        f"known-bad rows kept: {bad['num_selected']} of {bad['num_scored']}; "
        f"a random choice of this size would keep {expected:.0f}"
    )


def _manifest_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return content
