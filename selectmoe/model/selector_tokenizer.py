"""Loads the tokenizer of a selector, of either kind, without the code of a model."""

import functools
import logging

from transformers import PreTrainedTokenizerBase

from selectmoe.model.checkpoint import is_gguf
from selectmoe.model.selector_files import SelectorFiles
from selectmoe.model.tokenizer_loading import load_tokenizer

logger = logging.getLogger(__name__)


def load_selector_tokenizer(files: SelectorFiles) -> PreTrainedTokenizerBase:
    """The tokenizer alone. A log line says where it has no chat template, and the package's is
    used. Raises ModelError where it is missing or unreadable."""
    path = files.model_path()
    if is_gguf(path):
        from selectmoe.model.gguf_file import load_gguf_tokenizer  # loads the code of models

        tokenizer = load_gguf_tokenizer(path)
    else:
        tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        _warn_of_missing_template(files.model)
    return tokenizer


@functools.cache  # once a process, however many engines are loaded
def _warn_of_missing_template(model: str) -> None:
    logger.warning("%s: its tokenizer has no chat template; the package's is used", model)
