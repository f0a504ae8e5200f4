"""Merges a LoRA adapter of stage 1 into the model that it was trained on."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selectmoe.errors import ModelError, first_line


def merge_adapter(model: nn.Module, file: Path) -> nn.Module:
    """`model` (a SelectMoeForCausalLM) with the adapter of `file`'s folder in its weights: LoRA
    weights added, gates replaced. Dtype and classes stay the same.

    Raises ModelError where peft is not installed or the adapter is of another model.
    """
    dtype: torch.dtype = next(model.parameters()).dtype
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"{file}: a LoRA adapter needs `pip install peft`") from error
    with warnings.catch_warnings():
        # peft only warns of missing keys, which are an error here.
        warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
        # peft reads a property that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        try:
            adapted: Any = PeftModel.from_pretrained(model, file.parent)
        except Exception as error:  # a broken file, other shapes, other names: peft has many
            refusal = f"{file}: is not an adapter of this model: {first_line(error)}"
            raise ModelError(refusal) from error
    merged: nn.Module = adapted.merge_and_unload()
    return merged.to(dtype)
