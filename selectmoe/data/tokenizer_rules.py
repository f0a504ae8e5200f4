"""Which tokenizers can tokenize the beginning of a text alone, and what they need for it.

`first_tokens.py` has the argument. The tokenizers here are byte-level BPE (GPT-2, OLMoE, Llama 3,
Qwen, SmolLM) and BPE with byte fallback (Llama 2, Mistral, Gemma), recognized by their
tokenizer.json.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

_CONTRACTIONS = (
    "'s|'t|'re|'ve|'m|'ll|'d",
    "'(?:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
)
# Runs of letters, digits, other characters and white space: each piece ends with its run, and only
# white space looks at the character after it.
_GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2_PATTERNS = {f"{start}|{_GPT2}" for start in _CONTRACTIONS}
_LLAMA_3_PATTERNS = {
    f"{start}|{_LLAMA_3 % digits}" for start in _CONTRACTIONS for digits in ("", "{1,3}", "+")
}
# NFC leaves these characters as they are, whatever stands beside them.
_NFC_INERT = re.compile(r"[\t\n\r\x20-\x7e\u3001-\u3029\u4e00-\u9fa5\uff01-\uff5e]*")


@dataclass(frozen=True, slots=True)
class TokenizerRules:
    """What decides where a text may be cut."""

    as_symbols: Callable[[str], str]  # text in the characters of the vocabulary
    tokens: frozenset[str]
    pairs: frozenset[str]  # symbols that stand side by side in a token
    added_tokens: tuple[str, ...]
    is_nfc: bool  # the text is normalized to NFC first
    cuts_white_space: bool  # also between two characters of white space
    only_between_words: bool  # whole words may be tokens that merges do not reach

    def is_barrier(self, text: str, cut: int) -> bool:
        """Whether no token crosses the position, whatever stands around it."""
        left, right = self.as_symbols(text[cut - 1]), self.as_symbols(text[cut])
        return left[-1] + right[0] not in self.pairs

    def are_nfc_inert(self, text: str) -> bool:
        return _NFC_INERT.fullmatch(text) is not None

    def longest_token(self, text: str, start: int, end: int) -> int:
        """Length of the longest token that occurs near text[start:end], in symbols."""
        reach = max(map(len, self.tokens))  # a token that overlaps the range lies inside this
        symbols = self.as_symbols(text[max(start - reach, 0) : end + reach])
        return max((len(token) for token in self.tokens if token in symbols), default=1)

    def crosses_added_token(self, text: str, cut: int) -> bool:
        """Whether an added token such as <|user|> stands on both sides of the position."""
        return any(
            text.find(token, max(cut - len(token) + 1, 0), cut + len(token) - 1) >= 0
            for token in self.added_tokens
        )


def read_rules(tokenizer: Tokenizer) -> TokenizerRules | None:
    """None for a tokenizer whose texts must be tokenized as a whole."""
    try:
        content = json.loads(tokenizer.to_str())
    except Exception:  # a part written in Python; `tokenizers` has no class for this error
        return None
    model, added = content["model"], content["added_tokens"]
    normalizers = _steps(content["normalizer"], "normalizers")
    splitters = _steps(content["pre_tokenizer"], "pretokenizers")
    is_byte_level = bool(splitters) and splitters[-1]["type"] == "ByteLevel"
    white_space = [_cuts_white_space(step) for step in splitters]
    if (
        not _is_plain_bpe(model, is_byte_level=is_byte_level)
        or not all(map(_is_local_normalizer, normalizers))
        or None in white_space
        or any(step["type"] == "ByteLevel" for step in splitters[:-1])
        or any(token["single_word"] for token in added)
    ):
        return None
    is_nfc = any(step["type"] == "NFC" for step in normalizers)
    contents = tuple(token["content"] for token in added)
    if any(step["type"] == "Prepend" for step in normalizers):
        # Added tokens that are normalized, too, are then looked for with the prefix.
        contents += tuple(" " + token["content"] for token in added)
    if is_nfc and not all(map(str.isascii, contents)):
        return None
    tokens = frozenset(model["vocab"])
    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    return TokenizerRules(
        as_symbols=_byte_symbols if is_byte_level else _replaced(normalizers, splitters),
        tokens=tokens,
        pairs=frozenset(left + right for token in tokens for left, right in pairwise(token)),
        added_tokens=contents,
        is_nfc=is_nfc,
        cuts_white_space=all(white_space) and not strips,
        only_between_words=model.get("ignore_merges", False),
    )


def _steps(step: Mapping[str, Any] | None, key: str) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _is_plain_bpe(model: Mapping[str, Any], *, is_byte_level: bool) -> bool:
    """Whether every text has tokens by merges alone, without an unknown or a word-end token."""
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    needed = ByteLevel.alphabet() if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    return set(needed) <= model["vocab"].keys() and (is_byte_level or model["byte_fallback"])


def _is_local_normalizer(step: Mapping[str, Any]) -> bool:
    """Whether it changes each character by itself, apart from NFC."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1 and len(step["content"]) == 1
    return step["type"] in ("NFC", "Prepend")


def _cuts_white_space(step: Mapping[str, Any]) -> bool | None:
    """None for a pre-tokenizer that is not known to split by what is near; else whether it splits
    a beginning that ends inside white space as it splits the text."""
    kind = step["type"]
    if kind in ("ByteLevel", "Digits", "Metaspace"):
        return True
    if kind != "Split" or step["invert"]:
        return None
    pattern = step["pattern"]
    if len(pattern.get("String", "")) == 1:
        return True
    if step["behavior"] != "Isolated":
        return None
    if pattern.get("Regex") in _GPT2_PATTERNS:
        return True
    return False if pattern.get("Regex") in _LLAMA_3_PATTERNS else None


@functools.lru_cache(maxsize=65_536)
def _byte_symbols(text: str) -> str:
    """The UTF-8 bytes of the text, in the characters that byte-level vocabularies use for them."""
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def _replaced(
    normalizers: Sequence[Mapping[str, Any]], splitters: Sequence[Mapping[str, Any]]
) -> Callable[[str], str]:
    """The text after the replacements of single characters, such as a space by U+2581."""
    pairs = [
        (step["pattern"]["String"], step["content"])
        for step in normalizers
        if step["type"] == "Replace"
    ]
    pairs += [(" ", step["replacement"]) for step in splitters if step["type"] == "Metaspace"]
    return functools.partial(_translate, table=str.maketrans(dict(pairs)))


def _translate(text: str, *, table: dict[int, str]) -> str:
    return text.translate(table)
