"""Locates the PEFT adapter in a folder, without importing torch."""

import re
from pathlib import Path

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import read_json_object

ADAPTER_CONFIG_NAME = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def adapter_folder(path: Path) -> Path:
    """`path` if it is an adapter, else the last checkpoint of the stage 3 run in it.

    Raises ModelError if there is neither, or if its weights or its configuration are missing.
    """
    if not path.is_dir():
        raise ModelError(f"adapter folder {path} does not exist")
    folder = path if (path / ADAPTER_CONFIG_NAME).is_file() else _last_checkpoint(path)
    if not any(folder.glob("adapter_model.*")):
        raise ModelError(f"adapter {folder} has no weights (adapter_model.safetensors)")
    read_json_object(folder / ADAPTER_CONFIG_NAME)
    return folder


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
