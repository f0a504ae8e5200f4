"""Random Select-MoEs of a few thousand parameters."""

import torch

from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,  # greedy generation then has the length that is asked for
}
# Ten times the usual weights, and gates half open: a mask that leaks would hardly show else.
LOUD = {"initializer_range": 0.2, "quality_gate_init_std": 0.5, "quality_gate_init_bias": 0.0}


def tiny_config(**settings):
    return SelectMoeConfig(**{**SMALL, **settings})


def tiny_model(kind=SelectMoeForCausalLM, *, seed=0, **settings):
    """In evaluation mode; the same seed and settings give the same weights."""
    torch.manual_seed(seed)
    return kind(tiny_config(**settings)).eval()


def blocks(model):
    """The gated layers of either class."""
    return [layer.mlp for layer in getattr(model, "model", model).layers]
