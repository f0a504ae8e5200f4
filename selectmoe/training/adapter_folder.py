"""Locates the PEFT adapter in a folder, without importing torch."""

import re
from pathlib import Path

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import ADAPTER_FOLDER_NAME, is_hub_name, read_json_object
from selectmoe.paths import EMBEDDED_SELECTOR

ADAPTER_CONFIG_NAME = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def adapter_folder(path: Path) -> Path:
    """`path` if it is an adapter, else the one of the stage 3 run in it: its final adapter, or the
    last checkpoint of an unfinished run.

    Raises ModelError if there is neither, or if its weights or its configuration are missing.
    """
    if not path.is_dir():
        raise ModelError(f"adapter folder {path} does not exist")
    candidates = (path, path / ADAPTER_FOLDER_NAME)
    folders = [folder for folder in candidates if (folder / ADAPTER_CONFIG_NAME).is_file()]
    folder = folders[0] if folders else _last_checkpoint(path)
    if not any(folder.glob("adapter_model.*")):
        raise ModelError(f"adapter {folder} has no weights (adapter_model.safetensors)")
    read_json_object(folder / ADAPTER_CONFIG_NAME)
    return folder


def adapter_base(folder: Path) -> str | None:
    """The name or folder of the model that the adapter was trained on, if it is recorded."""
    base = read_json_object(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def base_revision_of(folder: Path) -> str | None:
    """The revision of the model that the adapter was trained on, if it is recorded."""
    revision = read_json_object(folder / ADAPTER_CONFIG_NAME).get("revision")
    return revision if isinstance(revision, str) and revision else None


def base_model_of(folder: Path) -> str | None:
    """The model to load the adapter onto if no other is given: the base that it names, or None for
    the embedded selector, whose folder differs between installations.

    Raises ModelError if that base is a folder that does not exist here.
    """
    base = adapter_base(folder)
    if base is None or Path(base).parts[-2:] == EMBEDDED_SELECTOR.parts[-2:]:
        return None
    if not is_hub_name(base) and not Path(base).is_dir():
        raise ModelError(
            f"adapter {folder} names {base} as its base model, which does not exist here; give the "
            "base with --model"
        )
    return base


def _last_checkpoint(run: Path) -> Path:
    checkpoints = {
        int(match[1]): folder
        for folder in run.iterdir()
        if (match := _CHECKPOINT.fullmatch(folder.name))
        and (folder / ADAPTER_CONFIG_NAME).is_file()
    }
    if not checkpoints:
        raise ModelError(
            f"adapter {run} contains neither {ADAPTER_CONFIG_NAME} nor a checkpoint-N that has one"
        )
    return checkpoints[max(checkpoints)]
