"""Stage 1's weights: saves and loads the trained gates, and merges a LoRA adapter."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selectmoe.errors import ModelError, first_line
from selectmoe.model.checkpoint import GATE_WEIGHTS_NAME, weights_file

_TRAINED_PARTS = (".quality_gate.", ".mlp.gate.", ".trash_expert.")


def gate_weights(model: nn.Module) -> dict[str, Tensor]:
    """The gates' tensors by name, without the prefix that differs between the model's classes."""
    return {
        name.removeprefix("model."): tensor.detach().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if any(part in f".{name}" for part in _TRAINED_PARTS)
    }


def save_gate_weights(model: nn.Module, directory: Path) -> Path:
    """Writes `full_rank_weights.safetensors`, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (GATE_WEIGHTS_NAME + ".partial")
    save_file(gate_weights(model), partial, metadata={"format": "pt"})
    return partial.replace(directory / GATE_WEIGHTS_NAME)


def load_gate_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the tensors of a file, or of the file in a folder, into the model.

    Raises ModelError where the file is absent, lacks a quality gate, or holds a tensor that the
    model has not or has in another shape.
    """
    file = weights_file(path)
    weights = _read(file)
    expected = gate_weights(model)
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ModelError(f"{file}: the model has no tensor {unknown[0]!r} ({len(unknown)} such)")
    missing = sorted(name for name in set(expected) - set(weights) if "quality_gate" in name)
    if missing:
        raise ModelError(f"{file}: lacks {missing[0]!r} ({len(missing)} quality-gate tensors)")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{file}: {name!r} must have the shape {tuple(expected[name].shape)} of the model, "
                f"got {tuple(tensor.shape)}"
            )
    prefix = "model." if hasattr(model, "lm_head") else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=False)


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


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:  # a pickle of the original implementation; weights_only runs no code from it
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{file}: not a readable weights file: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ModelError(f"{file}: must hold a dictionary of tensors by name")
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}
