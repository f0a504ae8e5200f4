"""Writes a model and stage 1's weights as one folder, which scores as the two together do.

>>> merge_weights("select-moe-1b-7b", "outputs/stage_1_pretrain/DATE/TIME", "selector")

Gates keep the dtype in which stage 1 saved them, so that scores are equal also in float32; of a
LoRA adapter the merged weights are rounded to the model's dtype.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn
from transformers import OlmoeConfig

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import (
    ADAPTER_WEIGHTS_NAME,
    model_folder,
    read_model_config,
    weights_file,
)
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.conversion import (
    card_facts,
    gated_config,
    gated_model,
    read_config,
    save_model,
)
from selectmoe.model.gate_weights import load_gate_weights, merge_adapter
from selectmoe.model.model_card import write_model_card
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.new_folder import new_folder, require_space, whole_folder
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.remote_code import has_remote_code
from selectmoe.model.tokenizer_loading import load_tokenizer, quiet_transformers
from selectmoe.model.vocabulary import require_tokenizer_fits
from selectmoe.model.weight_files import common_dtype, stored_tensors

_GATE_MODULES = ("quality_gate", "mlp.gate", "trash_expert")


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """The result of a merge."""

    base: str
    weights: Path  # stage 1's file
    folder: Path
    num_parameters: int


@quiet_transformers()
def merge_weights(
    base: str | Path, weights: str | Path, save_path: str | Path, *, remote_code: bool = False
) -> Merge:
    """Writes `base`, a Select-MoE or an OLMoE, with stage 1's weights to `save_path`: whole or not
    at all.

    weights: a file of gates or of an adapter, or the folder of a stage 1 run.
    Raises ConfigError where `save_path` cannot be a new folder, and ModelError where the base is of
    another type or the weights do not fit it.
    """
    file = weights_file(weights)
    target = new_folder(save_path)
    folder = model_folder(str(base))
    require_space(target, folder)
    tokenizer = load_tokenizer(folder)
    model = _with_weights(_load_base(folder), file)
    require_tokenizer_fits(str(folder), tokenizer, model.config.vocab_size)
    with whole_folder(target) as partial:
        save_model(model, tokenizer, partial, remote_code=remote_code or has_remote_code(folder))
        facts = card_facts(
            model,
            base=str(base),
            gates="trained by stage 1 and merged into this folder",
            origin="this base, and of stage 1 where it trained them",
        )
        write_model_card(partial, facts, base_folder=folder, name=target.name)
    return Merge(base=str(base), weights=file, folder=target, num_parameters=facts.num_parameters)


def _load_base(folder: Path) -> SelectMoeForCausalLM:
    """The model in the dtype of its files; an OLMoE gets gates, which the weights then replace."""
    dtype = common_dtype(stored_tensors(folder))
    model_type = read_model_config(str(folder)).get("model_type")
    if model_type == "select_moe":
        # Gates that are stored in float32 beside bfloat16 experts do not make the experts float32.
        own_dtype = read_config(SelectMoeConfig, folder).dtype
        return load_model(SelectMoeForCausalLM, folder, dtype=own_dtype or dtype)
    if model_type == "olmoe":
        config = gated_config(read_config(OlmoeConfig, folder), {})
        return gated_model(folder, config, dtype=dtype, seed=0)
    raise ModelError(
        f"{folder}: stage 1's weights can be merged into a Select-MoE or an OLMoE: model_type is "
        f"{model_type!r}"
    )


def _with_weights(model: SelectMoeForCausalLM, file: Path) -> SelectMoeForCausalLM:
    if file.name == ADAPTER_WEIGHTS_NAME:
        return cast(SelectMoeForCausalLM, merge_adapter(model, file))
    for name, module in model.named_modules():
        if name.endswith(_GATE_MODULES):
            cast(nn.Module, module).float()
    load_gate_weights(model, file)
    return model
