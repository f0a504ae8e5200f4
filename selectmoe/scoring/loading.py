"""Loads the model and the tokenizer of a ScoringEngine, with stage 1's weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from selectmoe.config.engine import EngineConfig
from selectmoe.model.checkpoint import ADAPTER_WEIGHTS_NAME, model_folder
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.gate_weights import load_gate_weights, merge_adapter
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import load_model, load_tokenizer


def load_scoring_model(
    model: str, checkpoint: Path | None, config: EngineConfig, *, device: str
) -> tuple[SelectMoeModel, PreTrainedTokenizerBase]:
    """checkpoint: stage 1's weights file, of its gates or of its adapter.

    Raises ModelError where the model cannot be loaded whole, or the weights do not fit it.
    """
    on_gpu = torch.device(device).type != "cpu"
    is_adapter = checkpoint is not None and checkpoint.name == ADAPTER_WEIGHTS_NAME
    # An adapter names its tensors by those of the whole model that it was trained on.
    model_class: Any = SelectMoeForCausalLM if is_adapter else SelectMoeModel
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    loaded: Any = load_model(
        model_class,
        folder,
        unused_parts=("lm_head",),
        dtype=choose_dtype(config.dtype, on_gpu=on_gpu),
        attn_implementation=config.attn_implementation,
        experts_implementation=choose_experts(config.experts_implementation, on_gpu=on_gpu),
    )
    if checkpoint is not None and is_adapter:
        loaded = merge_adapter(loaded, checkpoint).model
    elif checkpoint is not None:
        load_gate_weights(loaded, checkpoint)
    return loaded.to(device), tokenizer
