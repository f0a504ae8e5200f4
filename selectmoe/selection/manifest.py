"""manifest.json of a selection run: what was done, with which counts, thresholds and speed."""

from dataclasses import asdict, dataclass
from typing import Any

from selectmoe.config.code_version import code_version
from selectmoe.config.loading import resolved
from selectmoe.config.selection import SelectConfig
from selectmoe.data.writers import write_json
from selectmoe.scoring.calibration import Calibration, describe
from selectmoe.selection.differences import Kept, differences
from selectmoe.selection.keep_rule import Fate, fate_names
from selectmoe.selection.outputs import SelectedData
from selectmoe.selection.passes import Thresholds
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.top_k import Threshold


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
    signals: dict[str, int]  # signal -> scored rows without a finite value of it
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
        "selection": selection_of(config, selected),
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
    return [
        *selected.chosen.shortfalls,
        *differences(datasets, selected.median_answer_tokens),
    ]


def selection_of(config: SelectConfig, selected: SelectedData) -> dict[str, Any]:
    """Which rule has kept the rows, and the scored, rejected and left out rows by their fate."""
    rule, settings = selected.chosen.rule, config.selection
    is_drawn = settings.strategy in ("sampled", "random")
    return {
        "strategy": settings.strategy,
        "rank_by": settings.rank_by,
        "temperature": settings.temperature if settings.strategy == "sampled" else None,
        "seed": settings.seed if is_drawn else None,
        "floor": settings.floor,
        "budget": asdict(config.budget),
        "per_dataset": config.per_dataset,
        "min_per_dataset": settings.min_per_dataset,
        "max_per_dataset": settings.max_per_dataset,
        "ordered_by": rule.order.unit,
        "thresholds_by_dataset": None not in rule.thresholds,
        "floor_thresholds": _thresholds(rule.floors, "score", selected.calibration),
        "num_answer_tokens": selected.num_answer_tokens,
        "fates": fates(selected),
    }


def fates(selected: SelectedData) -> dict[str, int]:
    """Every row that was read, by its fate."""
    total, chosen = total_counts(selected), selected.chosen
    floors = chosen.rule.floors
    num_above = sum(row.num_kept for row in floors.values()) if floors else total["num_scored"]
    counts = {
        Fate.KEPT: total["num_selected"],
        Fate.BELOW_FLOOR: total["num_scored"] - num_above,
        Fate.OVER_DATASET_MAXIMUM: chosen.num_over_maximum,
    }
    counts[chosen.rule.dropped] = total["num_scored"] - sum(counts.values())
    names = {name: counts.get(Fate(fate), 0) for fate, name in fate_names().items()}
    return names | {"duplicate": total["num_left_out"], "rejected": total["num_rejected"]}


def thresholds(selected: SelectedData) -> dict[str, dict[str, Any]]:
    """The last kept rows: their score, with its percentile (null without a calibration), or by
    what else the strategy orders rows.

    That of the whole corpus is under "*". With thresholds by dataset, "*" is one of this name.
    """
    rule = selected.chosen.rule
    return _thresholds(rule.thresholds, rule.order.unit, selected.calibration)


def _thresholds(
    found: Thresholds, unit: str, calibration: Calibration | None
) -> dict[str, dict[str, Any]]:
    return {
        "*" if name is None else name: {
            unit: threshold.score,
            "row_key": threshold.row_key,
            "num_kept": threshold.num_kept,
            **({"percentile": _percentile(threshold, calibration)} if unit == "score" else {}),
        }
        for name, threshold in found.items()
    }


def _percentile(threshold: Threshold, calibration: Calibration | None) -> float | None:
    return calibration.percentile(threshold.score) if calibration else None


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
