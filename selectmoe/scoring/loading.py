"""Loads a selector and its tokenizer from files, for the scoring engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from selectmoe.config.engine import EngineConfig
from selectmoe.model.attached_gates import AttachedGates, attach_gates, load_gates
from selectmoe.model.checkpoint import ADAPTER_WEIGHTS_NAME, is_gguf, require_select_moe
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.gate_weights import load_gate_weights, merge_adapter
from selectmoe.model.gguf_file import load_gguf
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.selector_files import GatedBaseFiles, SelectMoeFiles, SelectorFiles
from selectmoe.model.selector_tokenizer import load_selector_tokenizer
from selectmoe.model.vocabulary import require_tokenizer_fits
from selectmoe.scoring.signals import needs_head


@dataclass(frozen=True, slots=True)
class LoadedSelector:
    """What a ScoringEngine is made of."""

    model: SelectMoeModel | SelectMoeForCausalLM | AttachedGates
    tokenizer: PreTrainedTokenizerBase


def load_selector(files: SelectorFiles, config: EngineConfig, *, device: str) -> LoadedSelector:
    """Raises ModelError where a file cannot be loaded or the gates are for another base."""
    if isinstance(files, GatedBaseFiles):
        return _load_gated_base(files, config, device=device)
    return _load_select_moe(files, config, device=device)


def _load_gated_base(files: GatedBaseFiles, config: EngineConfig, *, device: str) -> LoadedSelector:
    files.require_readable()
    tokenizer = load_selector_tokenizer(files)
    model = _load_base(files.model_path(), config, device=device)
    attached = attach_gates(model, load_gates(files.gates))
    if not needs_head(config.signals):
        attached.cut()  # before it is moved: the rest need not fit on the device
    require_tokenizer_fits(files.model, tokenizer, attached.vocab_size)
    return LoadedSelector(attached.to(device), tokenizer)


def _load_base(path: Path, config: EngineConfig, *, device: str) -> PreTrainedModel:
    on_gpu = torch.device(device).type != "cpu"
    if is_gguf(path):
        return load_gguf(path, dtype=choose_dtype(config.dtype, on_gpu=on_gpu))[0]
    model_class: Any = AutoModelForCausalLM
    base: PreTrainedModel = load_model(
        model_class,
        path,
        dtype=choose_dtype(config.dtype, on_gpu=on_gpu),
        attn_implementation=config.attn_implementation,
        experts_implementation=choose_experts(config.experts_implementation, on_gpu=on_gpu),
    )
    return base


def _load_select_moe(files: SelectMoeFiles, config: EngineConfig, *, device: str) -> LoadedSelector:
    require_select_moe(files.model)
    tokenizer = load_selector_tokenizer(files)
    loaded = _load_gated_model(files.model_path(), files.checkpoint, config, device=device)
    require_tokenizer_fits(files.model, tokenizer, loaded.config.vocab_size)
    return LoadedSelector(loaded, tokenizer)


def _load_gated_model(
    folder: Path, checkpoint: Path | None, config: EngineConfig, *, device: str
) -> SelectMoeModel | SelectMoeForCausalLM:
    """checkpoint: stage 1's weights file, of its gates or of its adapter.

    With its head only where a signal needs it.
    """
    with_head = needs_head(config.signals)
    on_gpu = torch.device(device).type != "cpu"
    is_adapter = checkpoint is not None and checkpoint.name == ADAPTER_WEIGHTS_NAME
    # An adapter names its tensors by those of the whole model that it was trained on.
    model_class: Any = SelectMoeForCausalLM if is_adapter or with_head else SelectMoeModel
    loaded: Any = load_model(
        model_class,
        folder,
        unused_parts=() if with_head else ("lm_head",),
        dtype=choose_dtype(config.dtype, on_gpu=on_gpu),
        attn_implementation=config.attn_implementation,
        experts_implementation=choose_experts(config.experts_implementation, on_gpu=on_gpu),
    )
    if checkpoint is not None and is_adapter:
        loaded = merge_adapter(loaded, checkpoint)
        loaded = loaded if with_head else loaded.model
    elif checkpoint is not None:
        load_gate_weights(loaded.model if with_head else loaded, checkpoint)
    model: SelectMoeModel | SelectMoeForCausalLM = loaded.to(device)
    return model
