"""Adds LoRA adapters, and finds the modules and fused experts that get one."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from selectmoe.config.lora import LoraSettings
from selectmoe.errors import ConfigError
from selectmoe.model.checkpoint import split_revision

if TYPE_CHECKING:
    from peft import PeftModel

_ATTENTION_MARKS = ("attn", "attention", "attend")
_NUM_LISTED = 8  # names listed in a message


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """Ends of module and parameter names, as peft matches them."""

    modules: tuple[str, ...]  # of linear modules
    parameters: tuple[str, ...] = ()  # of fused experts, 3-D weights that are not modules


def add_adapter(
    model: Any,  # noqa: ANN401 (a PreTrainedModel, which nn.Module's type does not say)
    lora: LoraSettings,
    *,
    model_name: str,
    modules_to_save: Sequence[str] = (),
) -> "PeftModel":
    """The model, frozen, with a new adapter, which at first changes nothing.

    modules_to_save: ends of names of modules that are trained whole and saved with the adapter.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = find_targets(model, lora, model_name=model_name)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        modules_to_save=list(modules_to_save) or None,
        task_type="CAUSAL_LM",
        revision=split_revision(model_name)[1],
    )
    with warnings.catch_warnings():
        # peft reads a property that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = get_peft_model(model, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def find_targets(model: nn.Module, lora: LoraSettings, *, model_name: str) -> LoraTargets:
    """What ends in the names of `lora.target_modules`; without any, the attention projections.

    Raises ConfigError for a name that nothing in the model ends with, for a model without linear
    attention projections, and for experts with dropout, which peft cannot apply to a parameter.
    """
    if not lora.target_modules:
        return LoraTargets(attention_projections(model, model_name))
    modules, experts = dict(linear_modules(model)), dict(expert_parameters(model))
    targets: dict[str, list[str]] = {"modules": [], "parameters": []}
    for name in lora.target_modules:
        if any(is_end(name, of=module) for module in modules):
            targets["modules"].append(name)
        elif any(is_end(name, of=parameter) for parameter in experts):
            targets["parameters"].append(name)
        else:
            raise ConfigError(
                f"training.lora.target_modules must name linear modules or fused experts of "
                f"{model_name} ({_list_ends([*modules, *experts])}), got {name!r}"
            )
    if targets["parameters"] and lora.lora_dropout:
        raise ConfigError(
            "training.lora.lora_dropout must be 0 where target_modules name fused experts, which "
            f"are parameters and not modules ({targets['parameters'][0]}), got "
            f"{lora.lora_dropout:g}"
        )
    return LoraTargets(tuple(targets["modules"]), tuple(targets["parameters"]))


def attention_projections(model: nn.Module, model_name: str) -> tuple[str, ...]:
    """Llama: q_proj, k_proj, v_proj, o_proj; GPT-2: attn.c_attn, attn.c_proj.

    A target is the last part of a name, or the last two where a module outside the attention has
    the same last part, such as GPT-2's mlp.c_proj.
    """
    inside, outside = {}, set()
    for name, _ in linear_modules(model):
        *above, last = name.split(".")
        if any(mark in part.lower() for part in above for mark in _ATTENTION_MARKS):
            inside[name] = last
        else:
            outside.add(last)
    if not inside:
        raise ConfigError(
            f"{model_name}: no linear attention projections found; name the modules to adapt in "
            f"training.lora.target_modules: {_list_ends(list(dict(linear_modules(model))))}"
        )
    ends = [
        last if last not in outside else ".".join(name.split(".")[-2:])
        for name, last in inside.items()
    ]
    return tuple(dict.fromkeys(ends))


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear module except the language-model head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The fused weights of all experts of a layer: [experts, out, in]."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            yield name, parameter


def targeted(model: nn.Module, targets: LoraTargets) -> Iterator[tuple[int, int, int]]:
    """(number of matrices, rows, columns) of every weight that gets an adapter."""
    for name, module in linear_modules(model):
        if any(is_end(target, of=name) for target in targets.modules):
            rows, columns = module.weight.shape  # type: ignore[misc]  # of Linear and Conv1D
            yield 1, int(rows), int(columns)
    for name, parameter in expert_parameters(model):
        if any(is_end(target, of=name) for target in targets.parameters):
            num_experts, rows, columns = parameter.shape
            yield num_experts, rows, columns


def is_end(name: str, *, of: str) -> bool:
    """True for "q_proj" and "self_attn.q_proj" of "model.layers.0.self_attn.q_proj"."""
    return f".{of}".endswith(f".{name}")


def _list_ends(names: Sequence[str]) -> str:
    """The distinct ends of names, the first few of them."""
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    rest = f", and {len(ends) - _NUM_LISTED} more" if len(ends) > _NUM_LISTED else ""
    return ", ".join(ends[:_NUM_LISTED]) + rest
