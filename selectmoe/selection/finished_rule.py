"""The rule by which a finished run has kept its rows, from its manifest and the stored scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selectmoe.config.loading import from_values
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems
from selectmoe.selection.keep_rule import KeepRule, ThresholdRule
from selectmoe.selection.orders import ByScore
from selectmoe.selection.passes import Thresholds
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.strategies import choose_rows, survey_scored
from selectmoe.selection.top_k import WHOLE_CORPUS, Threshold


def rule_of_run(manifest: Mapping[str, Any], folder: RunFolder, map_items: MapItems) -> KeepRule:
    """Thresholds of scores are in the manifest; what other orders need is computed again.

    folder: of the run that has scored.
    """
    selection = selection_of_run(manifest)
    if selection["ordered_by"] == "score":
        by_dataset = selection["thresholds_by_dataset"]
        return ThresholdRule(
            ByScore(),
            _read_thresholds(manifest["thresholds"], by_dataset=by_dataset),
            _read_thresholds(selection["floor_thresholds"], by_dataset=selection["per_dataset"]),
        )
    names = ("selection_percentage", "per_dataset")
    settings = {
        key: value
        for key, value in manifest["config"].items()
        if key in names or key.startswith("selection.")
    }
    return choose_rows(from_values(SelectConfig, settings), survey_scored(folder, map_items)).rule


def selection_of_run(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest's "selection"; of an older version, whose strategy was always `top`, made from
    its settings."""
    if "selection" in manifest:
        found: Mapping[str, Any] = manifest["selection"]
        return found
    config = manifest["config"]
    return {
        "strategy": "top",
        "floor": 0.0,
        "budget": {"unit": "fraction", "amount": config["selection_percentage"]},
        "per_dataset": config["per_dataset"],
        "min_per_dataset": None,
        "max_per_dataset": None,
        "ordered_by": "score",
        "thresholds_by_dataset": config["per_dataset"],
        "floor_thresholds": {},
    }


def scored_folder(output: RunFolder, manifest: Mapping[str, Any]) -> RunFolder:
    """The folder of the run that has scored, which is another one for a selection from stored
    scores."""
    named = manifest["config"].get("scored")
    return RunFolder(Path(named)) if named else output


def _read_thresholds(found: Mapping[str, Any], *, by_dataset: bool) -> Thresholds:
    return {
        name if by_dataset else WHOLE_CORPUS: Threshold(
            entry["score"], entry["row_key"], entry["num_kept"]
        )
        for name, entry in found.items()
    }
