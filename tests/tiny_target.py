"""A random Llama of a few thousand parameters, and conversations for it to learn."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selectmoe.model.tokenizer_loading import quiet_transformers
from tests.tiny_olmoe import SMALL, tiny_tokenizer

LLAMA = {
    name: SMALL[name]
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id",
        "initializer_range",
    )
} | {"intermediate_size": 48, "bos_token_id": 0}  # fmt: skip


def save_tiny_llama(folder: Path, **settings) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings}))
    with quiet_transformers():
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def conversation(number: int, *, length: int = 3) -> dict:
    """Rows of different lengths: the answer says `length` + number % 5 times the number."""
    answer = " ".join([str(number)] * (length + number % 5))
    return {
        "dataset": "numbers",
        "id": f"row-{number}",
        "messages": [
            {"role": "user", "content": f"say {number}"},
            {"role": "assistant", "content": answer},
        ],
    }


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
