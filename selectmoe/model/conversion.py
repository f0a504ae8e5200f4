"""Stage 0: converts an OLMoE into a Select-MoE that computes the same with its gates forced open.

>>> convert_olmoe("allenai/OLMoE-1B-7B-0125", "select-moe-1b-7b", seed=0)

No tensor of the base is changed: the new folder holds each of them bit for bit, in the hub's
layout and in the base's dtype, and the quality gates beside them. `parity.py` proves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectmoe.errors import ModelError, one_line
from selectmoe.model.checkpoint import model_folder, require_olmoe
from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.file_modes import follow_umask
from selectmoe.model.model_card import CardFacts, write_model_card
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.new_folder import new_folder, require_space, whole_folder
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.remote_code import add_remote_code
from selectmoe.model.tokenizer_loading import load_tokenizer, quiet_transformers
from selectmoe.model.vocabulary import require_tokenizer_fits
from selectmoe.model.weight_files import (
    common_dtype,
    hub_tensors,
    require_tensors,
    stored_tensors,
)

ADDED_PARTS = (".quality_gate.", ".trash_expert.")
"""Parts of the names of the tensors that a base does not have."""

# Settings that identify the base instead of describing its computation; they are not copied.
_NOT_TAKEN_OVER = (
    "model_type", "architectures", "output_router_logits", "dtype", "_name_or_path", "auto_map",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The result of a conversion, in numbers."""

    base: str
    folder: Path
    dtype: str
    num_layers: int
    num_experts: int
    num_tensors: int  # of the base's files; all of them are in the new ones
    num_parameters: int
    num_added_parameters: int


@quiet_transformers()
def convert_olmoe(
    base: str | Path,
    save_path: str | Path,
    *,
    seed: int = 0,
    remote_code: bool = False,
    **gate_settings: Any,  # noqa: ANN401 (settings of SelectMoeConfig, which types them)
) -> Conversion:
    """Writes `base`, a folder or hub name, as a Select-MoE to `save_path`: whole or not at all.

    seed: seed of the gates' initialization.
    remote_code: adds the model's code, so that the folder loads without this package.
    gate_settings: settings of SelectMoeConfig, such as quality_gate_init_bias.
    Raises ConfigError where `save_path` cannot be a new folder, and ModelError where the base is
    not an OLMoE, lacks a file or a tensor, or has an unknown tensor.
    """
    require_olmoe(str(base))
    target = new_folder(save_path)
    folder = model_folder(str(base))
    require_space(target, folder)
    config = read_config(OlmoeConfig, folder)
    stored = stored_tensors(folder)
    fused = meta_tensors(OlmoeForCausalLM, config)
    require_tensors(folder, stored, fused, tied=config.tie_word_embeddings)
    tokenizer = load_tokenizer(folder)
    require_tokenizer_fits(str(folder), tokenizer, config.vocab_size)
    with whole_folder(target) as partial:
        new_config = gated_config(config, gate_settings)
        dtype = common_dtype(stored)
        model = gated_model(folder, new_config, dtype=dtype, seed=seed)
        save_model(model, tokenizer, partial, remote_code=remote_code)
        # The files that were written must hold exactly the tensors of the new model.
        written = meta_tensors(SelectMoeForCausalLM, new_config)
        require_tensors(partial, stored_tensors(partial), written, tied=config.tie_word_embeddings)
        gates = f"as initialized, seed {seed}: train them with stage 1 before scoring"
        facts = card_facts(model, base=str(base), gates=gates, origin="this base, unchanged")
        write_model_card(partial, facts, base_folder=folder, name=target.name)
    num_added = facts.num_added_parameters
    return Conversion(
        base=str(base),
        folder=target,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=config.num_hidden_layers,
        num_experts=config.num_experts,
        num_tensors=len(stored),
        num_parameters=model.num_parameters() - num_added,
        num_added_parameters=num_added,
    )


def is_added(name: str) -> bool:
    """True for the tensors that a Select-MoE has in addition to those of its base."""
    return any(part in name for part in ADDED_PARTS)


def gated_config(config: OlmoeConfig, gate_settings: Mapping[str, object]) -> SelectMoeConfig:
    """The base's configuration with gates."""
    settings = config.to_dict()
    for key in _NOT_TAKEN_OVER:
        settings.pop(key, None)
    return SelectMoeConfig(**{**settings, **gate_settings})


def read_config(config_class: type[OlmoeConfig], folder: Path) -> Any:  # noqa: ANN401
    """The configuration of a folder as an instance of `config_class`."""
    try:
        return config_class.from_pretrained(folder)
    except Exception as error:  # its checks raise classes of their own
        raise ModelError(f"{folder / 'config.json'}: cannot be used: {one_line(error)}") from error


def meta_tensors(model_class: type[PreTrainedModel], config: OlmoeConfig) -> dict[str, Tensor]:
    """The tensors of a model of this configuration on the meta device, with fused experts."""
    try:
        with torch.device("meta"):
            return dict(model_class(config).state_dict())
    except Exception as error:  # an impossible configuration fails wherever it happens to
        raise ModelError(f"config.json describes no model that can be built: {error!r}") from error


def gated_model(
    folder: Path, config: SelectMoeConfig, *, dtype: torch.dtype, seed: int
) -> SelectMoeForCausalLM:
    """The base with new gates; only these depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_model(
            SelectMoeForCausalLM, folder, new_parts=ADDED_PARTS, config=config, dtype=dtype
        )


def card_facts(model: SelectMoeForCausalLM, *, base: str, gates: str, origin: str) -> CardFacts:
    """What the model card says of the model; see CardFacts."""
    return CardFacts(
        base=base,
        gates=gates,
        origin=origin,
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.config.num_hidden_layers,
        num_experts=model.config.num_experts,
        num_parameters=model.num_parameters(),
        num_added_parameters=sum(p.numel() for n, p in model.named_parameters() if is_added(n)),
    )


def save_model(
    model: SelectMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    remote_code: bool = False,
) -> None:
    """Writes weights, tokenizer and, if asked for, the model's code."""
    # Named explicitly: transformers would write the layout that the base was stored in.
    tensors = hub_tensors(model.state_dict())
    model.save_pretrained(folder, state_dict=tensors, save_original_format=False)
    tokenizer.save_pretrained(folder)  # with the chat template, where there is one
    follow_umask(folder)
    if remote_code:
        add_remote_code(folder)
