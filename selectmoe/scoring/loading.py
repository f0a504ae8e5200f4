"""Loads the model and the tokenizer of a ScoringEngine, with stage 1's weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectmoe.config.engine import EngineConfig
from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import ADAPTER_WEIGHTS_NAME
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.gate_weights import load_gate_weights
from selectmoe.model.merged_adapter import merge_adapter
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import quiet_transformers


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
    with quiet_transformers():
        try:
            # With output_loading_info it returns a pair, which its annotation leaves out.
            pair: Any = model_class.from_pretrained(
                model,
                dtype=choose_dtype(config.dtype, on_gpu=on_gpu),
                attn_implementation=config.attn_implementation,
                experts_implementation=choose_experts(config.experts_implementation, on_gpu=on_gpu),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{model}: cannot be loaded: {reason}") from error
    loaded, report = pair
    if report["missing_keys"]:
        raise ModelError(f"{model}: lacks the tensors {sorted(report['missing_keys'])[:3]}")
    if checkpoint is not None and is_adapter:
        loaded = merge_adapter(loaded, checkpoint).model
    elif checkpoint is not None:
        load_gate_weights(loaded, checkpoint)
    return loaded.to(device), tokenizer
