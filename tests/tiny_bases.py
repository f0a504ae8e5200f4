"""Random causal language models of a few thousand parameters, one for each family of bases."""

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from selectmoe.model.tokenizer_loading import quiet_transformers
from tests.tiny_olmoe import SMALL, tiny_tokenizer

_SHARED = {key: value for key, value in SMALL.items() if "expert" not in key} | {
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "bos_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        _EXPERTS | {"moe_intermediate_size": 16, "head_dim": 16, "mlp_only_layers": [0]},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, _EXPERTS | {"intermediate_size": 16}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    # A window shorter than the rows of the tests, in two of three layers.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 4},
    ),
}


def tiny_base(family: str = "llama", **settings) -> PreTrainedModel:
    """In evaluation mode; the same family and settings give the same weights."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**_SHARED, **own, **settings})).eval()


def save_tiny_base(folder: Path, family: str = "llama", **settings) -> Path:
    """With the tokenizer of `tiny_tokenizer`, which has a chat template."""
    with quiet_transformers():
        tiny_base(family, **settings).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder
