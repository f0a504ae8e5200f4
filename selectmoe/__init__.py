"""Select-MoE keeps the part of an instruction-tuning corpus that is worth training on.

Importing this package loads no torch; the names below load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectmoe.errors import SelectMoeError
    from selectmoe.model.configuration_select_moe import SelectMoeConfig
    from selectmoe.model.modeling_select_moe import (
        SelectMoeForCausalLM,
        SelectMoeModel,
        register_trash_expert,
    )
    from selectmoe.model.quiet_loading import register_select_moe
    from selectmoe.records import Message, Sample, ScoredSample
    from selectmoe.scoring.engine import ScoringEngine
    from selectmoe.selection.api import Selection, select

__version__ = "0.1.0"

__all__ = [
    "Message",
    "Sample",
    "ScoredSample",
    "ScoringEngine",
    "SelectMoeConfig",
    "SelectMoeError",
    "SelectMoeForCausalLM",
    "SelectMoeModel",
    "Selection",
    "register_select_moe",
    "register_trash_expert",
    "select",
]

_HOMES = {
    "Message": "records",
    "Sample": "records",
    "ScoredSample": "records",
    "ScoringEngine": "scoring.engine",
    "SelectMoeConfig": "model.configuration_select_moe",
    "SelectMoeError": "errors",
    "SelectMoeForCausalLM": "model.modeling_select_moe",
    "SelectMoeModel": "model.modeling_select_moe",
    "Selection": "selection.api",
    "register_select_moe": "model.quiet_loading",
    "register_trash_expert": "model.modeling_select_moe",
    "select": "selection.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'selectmoe' has no attribute {name!r}")
    if name in ("SelectMoeForCausalLM", "SelectMoeModel"):
        import_module("selectmoe.model.quiet_loading").register_select_moe()
    return getattr(import_module(f"selectmoe.{_HOMES[name]}"), name)
