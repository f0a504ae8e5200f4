"""The command that gives a selection again, from the configuration in its manifest."""

import shlex
from collections.abc import Mapping
from typing import Any

from selectmoe.config.loading import default_values
from selectmoe.config.selection import SelectConfig

# Where the files of the run lie, and how it was continued.
_LEFT_OUT = ("output", "output_root", "resume", "selection_percentage", "dataset.paths", "report")

MOST_PATHS = 20  # as a shell may have expanded a glob to thousands
MANY_PATHS = "CORPUS"
"""Stands for the paths where there are more."""


def command(settings: Mapping[str, Any]) -> str:
    """`selectmoe select` with each setting that is not its default.

    settings: the manifest's "config".
    """
    words = ["selectmoe", "select"]
    if (share := settings["selection_percentage"]) is not None:
        words += ["--pct", f"{share}"]
    if paths := settings.get("dataset.paths"):
        words += ["--data", *(paths if len(paths) <= MOST_PATHS else [MANY_PATHS])]
    defaults = default_values(SelectConfig)
    for key, value in settings.items():
        if key in _LEFT_OUT or key not in defaults or value == _as_json(defaults[key]):
            continue
        words.append(f"{key}={_override(value)}")
    return shlex.join(map(str, words))


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _override(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {entry}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
