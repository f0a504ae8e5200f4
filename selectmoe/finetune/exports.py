"""What a finished run leaves for use: the adapter without optimizer states, and the merged model.

adapter/   adapter weights, configuration and tokenizer
merged/    with merge=true: the base model with the adapter in its weights, and the tokenizer
"""

import shutil
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from selectmoe.config.finetune import FinetuneConfig
from selectmoe.model.checkpoint import ADAPTER_FOLDER_NAME, model_folder, read_model_config
from selectmoe.model.file_modes import follow_umask
from selectmoe.model.new_folder import whole_folder
from selectmoe.model.quiet_loading import load_model, register_select_moe
from selectmoe.model.tokenizer_loading import load_tokenizer, quiet_transformers
from selectmoe.paths import model_or_embedded
from selectmoe.training.adapter_loading import with_adapter

MERGED_FOLDER_NAME = "merged"
# What Trainer needs to resume, and nobody else.
TRAINING_STATES = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state*",
                   "training_args*", "finetune.json")  # fmt: skip


def save_final_adapter(checkpoint: Path, output: Path) -> Path:
    """Copies the adapter and its tokenizer out of the last checkpoint; returns their folder."""
    target = output / ADAPTER_FOLDER_NAME
    shutil.rmtree(target, ignore_errors=True)  # of a run that was interrupted after it
    with whole_folder(target, setting="output") as partial:
        ignored = shutil.ignore_patterns(*TRAINING_STATES)
        shutil.copytree(checkpoint, partial, ignore=ignored, dirs_exist_ok=True)
    return target


@quiet_transformers()
def merge_into_base(config: FinetuneConfig, output: Path) -> Path:
    """Writes the base model with the run's adapter in its weights, in the dtype of the base's
    files; returns its folder. On the CPU."""
    register_select_moe()
    name = model_or_embedded(config.model, config.revision)
    adapter = output / ADAPTER_FOLDER_NAME
    settings: dict[str, Any] = {}
    if read_model_config(name).get("model_type") == "select_moe":
        settings["quality_gate_forced_open"] = True  # as it was trained
    base = load_model(
        cast("type[PreTrainedModel]", AutoModelForCausalLM),
        model_folder(name),
        dtype="auto",
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers has given up
        merged: Any = with_adapter(base, adapter, given=name).merge_and_unload()
    target = output / MERGED_FOLDER_NAME
    shutil.rmtree(target, ignore_errors=True)
    with whole_folder(target, setting="output") as partial:
        merged.save_pretrained(partial)
        load_tokenizer(adapter).save_pretrained(partial)
        follow_umask(partial)
    return target
