"""Where the adapter of a folder lies, found out without torch."""

import re
from pathlib import Path

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import read_json_object

ADAPTER_CONFIG_NAME = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def adapter_folder(path: Path) -> Path:
    """`path` if it is an adapter, else the last checkpoint of the stage 3 run in it.

    Raises ModelError where there is neither, or one without weights or readable settings.
    """
    if not path.is_dir():
        raise ModelError(f"adapter folder {path} does not exist")
    folder = path if (path / ADAPTER_CONFIG_NAME).is_file() else _last_checkpoint(path)
    if not any(folder.glob("adapter_model.*")):
        raise ModelError(f"adapter {folder}: has no weights (adapter_model.safetensors)")
    read_json_object(folder / ADAPTER_CONFIG_NAME)
    return folder


def _last_checkpoint(run: Path) -> Path:
    checkpoints = {
        int(found[1]): folder
        for folder in run.iterdir()
        if (found := _CHECKPOINT.fullmatch(folder.name))
        and (folder / ADAPTER_CONFIG_NAME).is_file()
    }
    if not checkpoints:
        raise ModelError(
            f"adapter {run}: holds neither {ADAPTER_CONFIG_NAME} nor a checkpoint-N with one"
        )
    return checkpoints[max(checkpoints)]
