"""The model and the tokenizer of a ScoringEngine, with stage 1's weights in their places."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import ADAPTER_WEIGHTS_NAME
from selectmoe.model.gate_weights import load_gate_weights
from selectmoe.model.merged_adapter import merge_adapter
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_scoring_model(
    model: str,
    stage_1: Path | None,
    *,
    device: str,
    dtype: str | None,
    attn_implementation: str,
    experts_implementation: str | None,
) -> tuple[SelectMoeModel, PreTrainedTokenizerBase]:
    """stage_1: weights of its gates, or its adapter.

    Raises ModelError where the model cannot be loaded whole, or the weights do not fit it.
    """
    on_cpu = device == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    # A loop over experts is the faster one on a CPU, and a stall for each expert on a GPU.
    experts_implementation = experts_implementation or ("eager" if on_cpu else "grouped_mm")
    is_adapter = stage_1 is not None and stage_1.name == ADAPTER_WEIGHTS_NAME
    # An adapter names its tensors by those of the whole model that it was trained on.
    model_class: Any = SelectMoeForCausalLM if is_adapter else SelectMoeModel
    with quiet_transformers():
        try:
            # With output_loading_info it returns a pair, which its annotation leaves out.
            pair: Any = model_class.from_pretrained(
                model,
                dtype=DTYPES[dtype],
                attn_implementation=attn_implementation,
                experts_implementation=experts_implementation,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{model}: cannot be loaded: {reason}") from error
    loaded, report = pair
    if report["missing_keys"]:
        raise ModelError(f"{model}: lacks the tensors {sorted(report['missing_keys'])[:3]}")
    if stage_1 is not None and is_adapter:
        loaded = merge_adapter(loaded, stage_1).model
    elif stage_1 is not None:
        load_gate_weights(loaded, stage_1)
    return loaded.to(device), tokenizer
