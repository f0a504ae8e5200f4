"""The base of a gate warm-up: a causal language model whose gates only read."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from selectmoe.config.warmup import TrainingConfig
from selectmoe.errors import ModelError
from selectmoe.model.attached_gates import GateSet, save_gates
from selectmoe.model.base_weights import hash_base
from selectmoe.model.checkpoint import (
    is_gguf,
    model_folder,
    pinned_model,
    read_model_config,
    split_revision,
)
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.decoder_layers import decoder_layers
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.free_memory import require_weights_fit
from selectmoe.model.gates_config import BaseShape, GatesConfig
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.weight_checks import count_parameters
from selectmoe.training.memory_estimate import available_memory, skeleton
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.gate_fit import LinearGates, two_logits
from selectmoe.warmup.settings import layers_to_read, require_base_settings


def is_base(model: str) -> bool:
    """False for a Select-MoE, whose gates are a part of it. Raises ModelError where there is no
    model of this name."""
    return read_model_config(model).get("model_type") != SelectMoeConfig.model_type


def require_base(model: str, training: TrainingConfig) -> None:
    """Raises ModelError for a model that can have no gates, and ConfigError for settings that do
    not suit one. Reads no weight."""
    require_base_settings(training)
    if is_gguf(model_folder(model)):
        raise ModelError(
            f"{model}: gates cannot be warmed up on a GGUF file; load it with transformers and "
            "save it as a folder"
        )
    try:
        layers = decoder_layers(skeleton(str(model_folder(model))))
    except ModelError as error:
        where = "" if str(error).startswith(model) else f"{model}: "
        raise ModelError(f"{where}{error}") from error
    layers_to_read(training, len(layers))
    base_shape(model)


def load_base(folder: Path, training: TrainingConfig, worker: TrainingWorker) -> nn.Module:
    """The base in the dtype of inference, on the device of the worker.

    Raises NotEnoughMemoryError before it reads a weight, and ModelError where it cannot be loaded.
    """
    dtype = choose_dtype(training.dtype, on_gpu=worker.uses_gpu)
    # For FSDP the model is loaded on the CPU first: no GPU needs to hold it unsharded.
    device = "cpu" if training.strategy == "fsdp" else worker.device
    free, kind = available_memory(device, num_sharing=worker.num_sharing)
    num_parameters = count_parameters(str(folder), with_head=True)
    name = str(dtype).removeprefix("torch.")
    require_weights_fit(num_parameters, name, purpose="warm-up", free=free, kind=kind)
    model_class: Any = AutoModelForCausalLM
    model: nn.Module = load_model(
        model_class,
        folder,
        dtype=dtype,
        attn_implementation=training.attn_implementation,
        experts_implementation=choose_experts(
            training.experts_implementation, on_gpu=worker.uses_gpu
        ),
    )
    return model.requires_grad_(False).eval().to(torch.device(device))


def save_selector(
    folder: Path, gates: LinearGates, *, model: str, layers: tuple[int, ...]
) -> GateSet:
    """Writes the selector folder of gates on the layers of a base."""
    name, revision = split_revision(pinned_model(model))
    shape = base_shape(model)
    config = GatesConfig(
        base=name,
        revision=revision,
        base_sha256=hash_base(model_folder(model)),
        model_type=shape.model_type,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        layers=layers,
    )
    gate_set = GateSet(config, *two_logits(gates))
    save_gates(folder, gate_set)
    return gate_set


def base_shape(model: str) -> BaseShape:
    """By config.json alone. Raises ModelError where that does not describe decoder layers."""
    shape = BaseShape.from_settings(read_model_config(model))
    if shape is None:
        raise ModelError(f"{model}: its config.json names no hidden size and number of layers")
    return shape
