"""manifest.json of a selection run: what was done, with which counts, thresholds and speed."""

from dataclasses import asdict, dataclass
from typing import Any

from selectmoe.config.code_version import code_version
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.data.writers import write_json
from selectmoe.scoring.calibration import describe
from selectmoe.selection.differences import Kept, differences
from selectmoe.selection.outputs import SelectedData
from selectmoe.selection.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class ScoringReport:
    """What scoring took."""

    model: str
    weights_sha256: str
    length: str  # whether scores are adjusted for answer length or raw
    num_shards: int
    num_shards_reused: int  # had scores before this run began
    num_duplicate_ids: int
    num_unusable_names: int  # rows whose dataset or id was ignored
    device: str  # that computed the scores, of this run and of those that it resumed
    dtype: str
    num_tokens: int  # read by the model in this run
    seconds: float
    tokens_per_second: float


def write_manifest(
    config: SelectConfig,
    output: RunFolder,
    selected: SelectedData,
    scoring: dict[str, Any],
    *,
    wall_seconds: float,
) -> dict[str, Any]:
    """Writes `manifest.json`, last of all files: where it is, the run is complete.

    scoring: a ScoringReport, of this run or of the one whose scores are used.
    """
    manifest = {
        "code": code_version(),
        "config": resolved(config),
        "files": selected.files,
        "scoring": scoring,
        "datasets": {name: asdict(counts) for name, counts in selected.counts.items()},
        "total": total_counts(selected),
        "thresholds": thresholds(selected),
        "calibration": describe(selected.calibration) if selected.calibration else None,
        "score_quantiles": selected.quantiles,
        "median_answer_tokens": asdict(selected.median_answer_tokens),
        "warnings": warnings_of(selected),
        "wall_seconds": round(wall_seconds, 3),
    }
    write_json(output.manifest, manifest)
    return manifest


def warnings_of(selected: SelectedData) -> list[str]:
    """How the selected rows differ from all scored ones."""
    datasets = {
        name: Kept(counts.num_scored, counts.num_selected)
        for name, counts in selected.counts.items()
    }
    return differences(datasets, selected.median_answer_tokens)


def thresholds(selected: SelectedData) -> dict[str, dict[str, Any]]:
    """The thresholds, each with the percentile of its score; null without a calibration.

    That of the whole corpus is under "*". With `per_dataset`, "*" is a dataset of this name.
    """
    calibration = selected.calibration
    return {
        "*" if name is None else name: asdict(threshold)
        | {"percentile": calibration.percentile(threshold.score) if calibration else None}
        for name, threshold in selected.thresholds.items()
    }


def total_counts(selected: SelectedData) -> dict[str, int]:
    counts = selected.counts.values()
    return {
        "num_read": sum(c.num_read for c in counts),
        "num_scored": sum(c.num_scored for c in counts),
        "num_rejected": sum(sum(c.num_rejected.values()) for c in counts),
        "num_duplicates": sum(c.num_duplicates for c in counts),
        "num_left_out": sum(c.num_left_out for c in counts),
        "num_selected": sum(c.num_selected for c in counts),
        "num_tokens": sum(c.num_tokens for c in counts),
        "num_truncated": sum(c.num_truncated for c in counts),
    }
