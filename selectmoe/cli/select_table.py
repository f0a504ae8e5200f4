"""The table that a selection run prints at its end."""

from pathlib import Path
from typing import Any

from selectmoe.cli.command_line import format_table
from selectmoe.cli.progress import format_seconds
from selectmoe.data.rejected import rejected_file
from selectmoe.selection.rule_text import describe_rule, is_plain
from selectmoe.selection.run_folder import RunFolder

DEMO_BAD = "demo_corrupted"


def print_selection(manifest: dict[str, Any], output: Path) -> None:
    """One line per dataset, what the run took, and where its files are."""
    selection = manifest["selection"]
    by_score = selection["ordered_by"] == "score"
    by_dataset = selection["thresholds_by_dataset"]
    rows: list[tuple[str, ...]] = [
        ("dataset", "read", "scored", "rejected", "duplicates", "selected", "threshold")
    ]
    for name, counts in manifest["datasets"].items():
        rejected = sum(counts["num_rejected"].values())
        rows.append(_row(name, counts, rejected, _threshold(manifest, name) if by_dataset else ""))
    total = manifest["total"]
    corpus_threshold = "" if by_dataset else _threshold(manifest, "*")
    rows.append(_row("all", total, total["num_rejected"], corpus_threshold))
    print(f"\n{format_table(rows if by_score else [row[:-1] for row in rows])}\n")
    if not is_plain(selection):
        print(describe_rule(selection, num_datasets=len(manifest["thresholds"])))
    if total["num_duplicates"]:
        print(_duplicates_line(total))
    if DEMO_BAD in manifest["datasets"]:
        print(_demo_line(manifest["datasets"][DEMO_BAD], total))
    if manifest["calibration"] and by_score and manifest["thresholds"]:
        print(_percentile_line(manifest))
    for warning in manifest["warnings"]:
        print(f"warning: {warning}")
    truncated = f", {total['num_truncated']:,} rows truncated" if total["num_truncated"] else ""
    print(
        f"{total['num_tokens']:,} tokens{truncated}, scored at "
        f"{manifest['scoring']['tokens_per_second']:,.0f} tokens/s; "
        f"{format_seconds(manifest['wall_seconds'])} in all"
    )
    run = RunFolder(output)
    for path in (run.selected_data, rejected_file(output), run.scored, run.manifest):
        if path.exists():
            print(path)


def _row(name: str, counts: dict[str, Any], num_rejected: int, threshold: str) -> tuple[str, ...]:
    read, scored, duplicates, selected = (
        f"{counts[key]:,}" for key in ("num_read", "num_scored", "num_duplicates", "num_selected")
    )
    return name, read, scored, f"{num_rejected:,}", duplicates, selected, threshold


def _duplicates_line(total: dict[str, int]) -> str:
    number = f"{total['num_duplicates']:,} rows have exactly the text of another row"
    if total["num_left_out"]:
        return f"{number} and are left out; selection.duplicates=keep scores them"
    return f"{number} and are scored too; selection.duplicates=drop leaves them out"


def _threshold(manifest: dict[str, Any], name: str) -> str:
    threshold = manifest["thresholds"].get(name)
    return f"{threshold['score']:.4f}" if threshold and "score" in threshold else ""


def _percentile_line(manifest: dict[str, Any]) -> str:
    percentiles = [threshold["percentile"] for threshold in manifest["thresholds"].values()]
    lowest, highest = f"{min(percentiles):.1f}", f"{max(percentiles):.1f}"
    limits = f" {lowest}" if lowest == highest else f"s {lowest} to {highest}"
    num_samples = manifest["calibration"]["num_samples"]
    return f"threshold at percentile{limits} of {num_samples:,} rows of the warm-up corpus"


def _demo_line(bad: dict[str, Any], total: dict[str, int]) -> str:
    expected = bad["num_scored"] * total["num_selected"] / total["num_scored"]
    return (
        f"known-bad rows kept: {bad['num_selected']} of {bad['num_scored']}; "
        f"a random choice of this size would keep {expected:.0f}"
    )
