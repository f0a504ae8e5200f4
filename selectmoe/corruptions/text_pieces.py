"""Splits text into words or sentences and the white space after each, and joins them again."""

import re
from collections.abc import Sequence
from random import Random

from selectmoe.records import Sample

Donors = Sequence[Sample]  # other samples, whose answers a corruption may use
LONG_WORD = re.compile(r"[^\W\d_]{4,}")
MIN_WORDS = 4  # of an answer whose order can be corrupted

# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces between words: each character of
# these scripts, punctuation included, counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65"
)
_WORD_AND_GAP = re.compile(rf"([{_UNSPACED}]|[^\s{_UNSPACED}]+)(\s*)")
# Latin and Arabic punctuation ends a sentence only before white space, that of Chinese and Hindi
# anywhere; a line break ends one too.
_SENTENCE_AND_GAP = re.compile(
    r"""(\S.*?(?:[.!?\u2026\u061f]+["')\]]*(?=\s|$)|[\u3002\uff01\uff1f\u0964]+|(?=\n)|$))(\s*)"""
)


def split_words(text: str) -> tuple[list[str], list[str]]:
    """The words, and the white space after each."""
    return _split(_WORD_AND_GAP, text)


def split_sentences(text: str) -> tuple[list[str], list[str]]:
    """The sentences, which also end at a line break, and the white space after each."""
    return _split(_SENTENCE_AND_GAP, text)


def _split(expression: re.Pattern[str], text: str) -> tuple[list[str], list[str]]:
    pairs = expression.findall(text)
    return [piece for piece, _ in pairs], [gap for _, gap in pairs]


def join_pieces(pieces: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(piece + gap for piece, gap in zip(pieces, gaps, strict=True))


def some_positions(num_items: int, share: float, random: Random) -> set[int]:
    """Random positions of about `share` of the items, and of at least one if there are any."""
    num_chosen = max(round(share * num_items), min(num_items, 1))
    return set(random.sample(range(num_items), num_chosen))


def shuffled_pieces(pieces: Sequence[str], random: Random) -> list[str]:
    """The pieces in another order; they must not all be equal."""
    moved = list(pieces)
    while moved == pieces:
        random.shuffle(moved)
    return moved
