"""A random OLMoE of a few thousand parameters with a real tokenizer, as the hub would hold it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from selectmoe.model.tokenizer_loading import quiet_transformers

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
)
SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "eos_token_id": 0,
    # Ten times the usual: at this width experts would else hardly move the logits.
    "initializer_range": 0.2,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL["vocab_size"] - 8,  # like the hub's: fewer tokens than embeddings
        special_tokens=[END, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the gate is open and the other one is not"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def save_tiny_olmoe(
    folder: Path, *, layout: str = "hub", dtype: torch.dtype = torch.float32, **settings
) -> Path:
    """layout: "hub" has three tensors an expert, "fused" two a layer, "sharded" many hub files."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**{**SMALL, **settings})).to(dtype)
    with quiet_transformers():
        model.save_pretrained(
            folder,
            save_original_format=layout != "fused",
            max_shard_size="20KB" if layout == "sharded" else "1GB",
        )
        tiny_tokenizer().save_pretrained(folder)
    return folder
