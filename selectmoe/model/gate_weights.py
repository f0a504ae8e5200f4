"""Stage 1's weights: saves and loads the trained gates, and merges a LoRA adapter."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from selectmoe.data.writers import whole_file, write_json
from selectmoe.errors import ModelError, first_line
from selectmoe.model.checkpoint import GATE_WEIGHTS_NAME, read_json_object, weights_file
from selectmoe.model.modeling_select_moe import SelectMoeSparseMoeBlock, build_trash_expert
from selectmoe.model.weight_headers import read_header

TRASH_EXPERT_SETTINGS = ("trash_expert_mode", "trash_expert_name")
FORCED_OPEN = "quality_gate_forced_open"
# One key: safetensors writes several in an order that differs from one process to the next.
METADATA_KEY = "select_moe"
GATE_SETTINGS_NAME = "gate_settings.json"  # in the folder of an adapter
_TRAINED_PARTS = (".quality_gate.", ".mlp.gate.", ".trash_expert.")
# The original implementation nests its tensors, and names a layer's parts otherwise.
_ORIGINAL_KEY = "full_rank_weights"
_ORIGINAL_GATE = ".quality_gate.gate.weight"


def gate_weights(model: nn.Module) -> dict[str, Tensor]:
    """The gates' tensors by name, without the prefix that differs between the model's classes."""
    return {
        name.removeprefix("model."): tensor.detach().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if any(part in f".{name}" for part in _TRAINED_PARTS)
    }


def save_gate_weights(model: nn.Module, directory: Path) -> Path:
    """Writes `full_rank_weights.safetensors`, whole or not at all, with what the trash experts are
    and whether the gates only read in its metadata: the gates were trained so."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(gate_settings(model), sort_keys=True)
    content = save(gate_weights(model), {METADATA_KEY: settings})
    path = directory / GATE_WEIGHTS_NAME
    with whole_file(path) as file:
        file.write(content)
    return path


def load_gate_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the tensors of a file, or of the file in a folder, into the model, whose trash experts
    become those that the file was trained with, and whose gates act or only read as they did.

    Raises ModelError where the file is absent, lacks a quality gate, or holds a tensor that the
    model has not or has in another shape.
    """
    file = weights_file(path)
    weights, settings = read_gate_weights(file)
    apply_gate_settings(model, settings, file)
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


def gate_settings(model: nn.Module) -> dict[str, str]:
    """What gates were trained with, as texts: the trash experts, and whether gates only read."""
    config: Any = model.config
    return {**trash_expert_settings(model), FORCED_OPEN: str(bool(config.quality_gate_forced_open))}


def apply_gate_settings(model: nn.Module, settings: Mapping[str, str], file: Path) -> None:
    """Makes the model what its gates were trained in; absent settings stay the model's."""
    trash = {name: text for name, text in settings.items() if name in TRASH_EXPERT_SETTINGS}
    set_trash_experts(model, trash, file)
    if FORCED_OPEN not in settings:
        return
    config: Any = model.config
    config.quality_gate_forced_open = settings[FORCED_OPEN] == "True"
    for block in model.modules():
        if isinstance(block, SelectMoeSparseMoeBlock):
            block.forced_open = config.quality_gate_forced_open


def trash_expert_settings(model: nn.Module) -> dict[str, str]:
    """The settings of a model that its trash experts are built from, as texts."""
    config: Any = model.config
    values = {name: getattr(config, name, None) for name in TRASH_EXPERT_SETTINGS}
    return {name: str(value) for name, value in values.items() if value is not None}


def set_trash_experts(model: nn.Module, settings: Mapping[str, str], file: Path) -> None:
    """Gives every layer the trash expert of these settings, unless it has it already.

    file: where the settings come from, for the ModelError of an expert that is not registered.
    """
    if not settings or settings == trash_expert_settings(model):
        return
    config: Any = model.config
    for name in TRASH_EXPERT_SETTINGS:
        setattr(config, name, settings.get(name))
    for block in model.modules():
        if isinstance(block, SelectMoeSparseMoeBlock):
            weight = block.quality_gate.weight
            try:
                expert = build_trash_expert(config, block.layer_idx)
            except ValueError as error:
                raise ModelError(f"{file}: {first_line(error)}") from error
            block.trash_expert = expert.to(weight.device, weight.dtype)


def write_gate_settings(model: nn.Module, folder: Path) -> None:
    """Beside an adapter, whose files have no place for such settings."""
    write_json(folder / GATE_SETTINGS_NAME, gate_settings(model))


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
    settings_file = file.parent / GATE_SETTINGS_NAME
    if settings_file.is_file():
        settings = read_json_object(settings_file)
        apply_gate_settings(model, {name: str(text) for name, text in settings.items()}, file)
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


def read_gate_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by the names of this model, without prefix, and the `gate_settings` that they
    were trained with; none where the file does not say.

    Raises ModelError where the file cannot be read or holds anything else.
    """
    settings: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            weights: object = load_file(file)
            settings = _settings_in(read_header(file).metadata)
        else:  # a pickle of the original implementation; weights_only runs no code from it
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{file}: not a readable weights file: {first_line(error)}") from error
    if isinstance(weights, dict):
        weights = weights.get(_ORIGINAL_KEY, weights)
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ModelError(f"{file}: must hold a dictionary of tensors by name")
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if not settings and any(name.endswith(".trash_expert.vector") for name in named):
        settings = {"trash_expert_mode": "custom"}  # of a version that did not write it down
    return _with_our_names(named), settings


def _settings_in(metadata: Mapping[str, str]) -> dict[str, str]:
    settings = json.loads(metadata.get(METADATA_KEY, "{}"))
    names = (*TRASH_EXPERT_SETTINGS, FORCED_OPEN)
    return {name: str(settings[name]) for name in names if name in settings}


def _with_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original implementation's tensors by our names; others as they are.

    Its gates have no bias. Those of its later form give one number, whose sigmoid is the
    good-probability: the softmax of that number beside 0.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, gate, _ = name.partition(_ORIGINAL_GATE)
        if not gate:
            renamed[name.replace(".normal_moe.", ".mlp.")] = tensor
            continue
        rows = tensor if len(tensor) == 2 else torch.cat([tensor, torch.zeros_like(tensor)])
        renamed[f"{layer}.mlp.quality_gate.weight"] = rows
        renamed[f"{layer}.mlp.quality_gate.bias"] = torch.zeros(2, dtype=tensor.dtype)
    return renamed
