"""The embedded selector with a tokenizer that knows two tokens more than the model."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from selectmoe.paths import EMBEDDED_SELECTOR

ADDED = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def extended_selector(folder: Path) -> Path:
    """As a user makes it who adds the tokens of ChatML and does not resize the embeddings."""
    shutil.copytree(EMBEDDED_SELECTOR, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED)})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
