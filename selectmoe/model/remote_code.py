"""Adds the model's code to a folder, so that transformers loads it without this package.

>>> AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import shutil
from pathlib import Path

from selectmoe.data.writers import write_json
from selectmoe.model.checkpoint import read_json_object

REMOTE_FILES = ("configuration_select_moe.py", "modeling_select_moe.py", "quality_losses.py")
"""They import one another relatively, and besides only torch, transformers and huggingface_hub."""

AUTO_MAP = {
    "AutoConfig": "configuration_select_moe.SelectMoeConfig",
    "AutoModel": "modeling_select_moe.SelectMoeModel",
    "AutoModelForCausalLM": "modeling_select_moe.SelectMoeForCausalLM",
}


def add_remote_code(folder: Path) -> None:
    """Copies the model's files into the folder and names their classes in its config.json."""
    for name in REMOTE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    config = folder / "config.json"
    write_json(config, read_json_object(config) | {"auto_map": AUTO_MAP})


def has_remote_code(folder: Path) -> bool:
    return "auto_map" in read_json_object(folder / "config.json")
