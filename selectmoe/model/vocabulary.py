"""Checks that a model embeds every token of its tokenizer, without importing torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selectmoe.errors import ModelError, list_names
from selectmoe.model.checkpoint import read_json_object

# A tokenizer is one of these files; without any, transformers builds an empty tokenizer.
VOCABULARY_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
REMEDY = "resize the model (resize_token_embeddings) or restore the tokenizer of its training"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_NAMES)


def require_embedded(
    name: str,
    tokens: Mapping[str, int],
    *,
    vocab_size: int,
    pad_token: str | None = None,
    remedy: str | None = None,
) -> None:
    """Raises ModelError for a tokenizer that has more tokens than the model has embeddings.

    name: of the model or folder, for the message. pad_token: may lie beyond the embeddings, as in
    some checkpoints whose tokenizer got one later: padding is masked, and padded with another id.
    """
    beyond = {token: number for token, number in tokens.items() if number >= vocab_size}
    if beyond.keys() - {pad_token}:
        names = list_names(sorted(beyond, key=beyond.__getitem__), most=3)
        raise ModelError(
            f"{name}: its tokenizer has token ids up to {max(beyond.values())}, more than the "
            f"model's vocab_size of {vocab_size}: the model has no embedding for {names}; "
            f"{remedy or REMEDY}"
        )


def require_tokenizer_fits(
    name: str,
    tokenizer: Any,  # noqa: ANN401 (a PreTrainedTokenizerBase, whose import takes seconds)
    vocab_size: int,
    *,
    remedy: str | None = None,
) -> None:
    """As `require_embedded`, of a transformers tokenizer."""
    tokens, pad_token = tokenizer.get_vocab(), tokenizer.pad_token
    require_embedded(name, tokens, vocab_size=vocab_size, pad_token=pad_token, remedy=remedy)


def require_stored_vocabulary(folder: Path, vocab_size: object) -> None:
    """As `require_embedded`, from a folder's tokenizer.json; a folder without one passes."""
    file = folder / "tokenizer.json"
    if not file.is_file() or not isinstance(vocab_size, int):
        return
    content = read_json_object(file)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        tokens |= vocabulary
    elif isinstance(vocabulary, list):  # unigram: [token, log probability] by id
        tokens |= {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if isinstance(added, list):
        tokens |= {entry["content"]: entry["id"] for entry in added}
    require_embedded(str(folder), tokens, vocab_size=vocab_size, pad_token=_pad_token(folder))


def _pad_token(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    token = read_json_object(file).get("pad_token") if file.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
