"""Loads the model of a gate warm-up, freezes what is not trained and adds LoRA where it is set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selectmoe.config.warmup import TrainingConfig
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.conversion import meta_tensors, read_config
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.free_memory import require_weights_fit
from selectmoe.model.modeling_select_moe import QualityGate, SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import load_model
from selectmoe.training.lora_targets import add_adapter
from selectmoe.training.memory_estimate import available_memory
from selectmoe.warmup.gate_objectives import (
    ContrastiveObjective,
    LanguageModelObjective,
    Objective,
)
from selectmoe.warmup.settings import is_contrastive, learns_detached

_GATE_PARTS = ("mean", "std", "bias")  # of training.quality_gate_init_*
QUALITY_GATES, MOE_GATES, TRASH_EXPERTS = ".quality_gate.", ".mlp.gate.", ".trash_expert."


def is_gate(name: str) -> bool:
    """True for the tensors of gates and trash experts, which are kilobytes."""
    return any(part in f".{name}" for part in (QUALITY_GATES, MOE_GATES, TRASH_EXPERTS))


@dataclass(frozen=True, slots=True, eq=False)
class Trainee:
    """A model ready for GateTrainer, and its objective."""

    model: nn.Module
    objective: Objective
    is_adapter: bool


def gated_settings(config: SelectMoeConfig, training: TrainingConfig) -> SelectMoeConfig:
    """The model's configuration with the settings of the warm-up."""
    if is_contrastive(training):
        config.quality_loss_weight = 0.0  # the trainer adds the contrastive loss
    else:
        if training.quality_loss_type != config.quality_loss_type:
            config.quality_loss_parameters = None  # they belong to another loss
        config.quality_loss_type = training.quality_loss_type
        config.quality_loss_weight = training.quality_loss_weight
    if not learns_detached(training):
        # A loss on the model's outputs reaches gates and trash experts only where they act on them.
        config.quality_gate_forced_open = False
    config.sample_wise_averaging = training.sample_wise_averaging
    config.enable_load_balancing = training.enable_load_balancing
    settings = ("trash_expert_mode", *(f"quality_gate_init_{part}" for part in _GATE_PARTS))
    for name in settings:
        if getattr(training, name) is not None:
            setattr(config, name, getattr(training, name))
    return config


def load_gated_model(
    folder: Path, training: TrainingConfig, *, uses_gpu: bool, seed: int, num_sharing: int = 1
) -> Any:  # noqa: ANN401 (a SelectMoeForCausalLM, whose methods transformers does not type)
    """The Select-MoE of a folder in the dtype of the warm-up, with new gates where settings ask.

    Raises NotEnoughMemoryError before it reads a weight, and ModelError where it cannot be loaded.
    """
    config = gated_settings(read_config(SelectMoeConfig, folder), training)
    dtype = choose_dtype(training.dtype, on_gpu=uses_gpu)
    # For FSDP the model is loaded on the CPU first: no GPU needs to hold it unsharded.
    on_gpu = uses_gpu and training.strategy != "fsdp"
    require_memory(config, dtype, uses_gpu=on_gpu, num_sharing=num_sharing)
    model = load_model(
        SelectMoeForCausalLM,
        folder,
        new_parts=(TRASH_EXPERTS,),  # training.trash_expert_mode=custom may add one
        config=config,
        dtype=dtype,
        attn_implementation=training.attn_implementation,
        experts_implementation=choose_experts(training.experts_implementation, on_gpu=uses_gpu),
    )
    if any(getattr(training, f"quality_gate_init_{part}") is not None for part in _GATE_PARTS):
        renew_gates(model, seed=seed)
    return model


def require_memory(
    config: SelectMoeConfig, dtype: torch.dtype, *, uses_gpu: bool, num_sharing: int = 1
) -> None:
    """Raises NotEnoughMemoryError where the weights alone do not fit.

    num_sharing: workers on this machine, which share its memory where they have no GPU.
    """
    num_parameters = sum(t.numel() for t in meta_tensors(SelectMoeForCausalLM, config).values())
    free, kind = available_memory("cuda" if uses_gpu else "cpu", num_sharing=num_sharing)
    name = str(dtype).removeprefix("torch.")
    require_weights_fit(num_parameters, name, purpose="warm-up", free=free, kind=kind)


def renew_gates(model: Any, *, seed: int) -> None:  # noqa: ANN401
    """Re-initializes every quality gate from the model's configuration and the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, QualityGate):
                for parameter in module.parameters():
                    # transformers marks loaded parameters, and would not initialize them again.
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                model._init_weights(module)


def prepare_trainee(
    model: Any,  # noqa: ANN401 (a SelectMoe of either class)
    training: TrainingConfig,
    *,
    name: str,
    seed: int,
) -> Trainee:
    """Freezes what is not trained, adds LoRA, and pairs the model with its objective.

    name: of the model, for messages. seed: for the initial weights of the adapter.
    """
    label_weight, weight = training.label_weight, training.quality_loss_weight
    if learns_detached(training):
        decoder: SelectMoeModel = getattr(model, "model", model)
        freeze_all_but(decoder, (QUALITY_GATES,))
        decoder.detach_gates()
        objective: Objective = ContrastiveObjective(label_weight, weight)
        return Trainee(decoder, objective, is_adapter=False)
    objective = LanguageModelObjective(label_weight, weight)
    if training.peft_mode == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = with_adapter(model, training, name=name)
        return Trainee(adapted, objective, is_adapter=True)
    freeze_all_but(model, trained_parts(training))
    return Trainee(model, objective, is_adapter=False)


def trained_parts(training: TrainingConfig) -> tuple[str, ...]:
    """Parts of the names of the tensors that full_rank trains. A trained trash vector belongs to
    the quality gates, which mix it in."""
    parts = (QUALITY_GATES, TRASH_EXPERTS) if training.train_quality_gates else ()
    return (*parts, MOE_GATES) if training.train_moe_gates else parts


def freeze_all_but(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Freezes the others. Trained parameters become float32: bfloat16 rounds AdamW's steps away."""
    for name, parameter in model.named_parameters():
        is_trained = any(part in f".{name}" for part in parts)
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data = parameter.data.float()


def with_adapter(model: Any, training: TrainingConfig, *, name: str) -> Any:  # noqa: ANN401 (a PeftModel)
    """LoRA on the named modules; the trained gates are saved as a whole with the adapter."""
    gates = ["quality_gate"] if training.train_quality_gates else []
    # "gate" alone would match the quality gates too: peft compares the ends of names.
    gates += ["mlp.gate"] if training.train_moe_gates else []
    if training.train_quality_gates and any(
        TRASH_EXPERTS in n for n, _ in model.named_parameters()
    ):
        gates.append("trash_expert")  # it gets a gradient through the outputs of the layers
    adapted = add_adapter(model, training.lora, model_name=name, modules_to_save=gates)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
