"""Text as words and sentences with the white space behind each, for whoever rearranges it."""

import re
from collections.abc import Sequence
from random import Random

MIN_WORDS = 4  # of an answer that has an order to lose

# Thai, Lao, Burmese, Khmer, Japanese and Chinese put no spaces between words: there a letter, and a
# mark of theirs, counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65"
)
_WORD_AND_GAP = re.compile(rf"([{_UNSPACED}]|[^\s{_UNSPACED}]+)(\s*)")
# The marks of Latin and Arabic text end a sentence before a space, those of Chinese and Hindi
# anywhere, and a line break ends one too.
_SENTENCE_AND_GAP = re.compile(
    r"""(\S.*?(?:[.!?\u2026\u061f]+["')\]]*(?=\s|$)|[\u3002\uff01\uff1f\u0964]+|(?=\n)|$))(\s*)"""
)


def split_words(text: str) -> tuple[list[str], list[str]]:
    """The words, and the white space behind each."""
    return _split(_WORD_AND_GAP, text)


def split_sentences(text: str) -> tuple[list[str], list[str]]:
    """The sentences, a line break ending one too, and the white space behind each."""
    return _split(_SENTENCE_AND_GAP, text)


def _split(expression: re.Pattern[str], text: str) -> tuple[list[str], list[str]]:
    pairs = expression.findall(text)
    return [piece for piece, _ in pairs], [gap for _, gap in pairs]


def join_pieces(pieces: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(piece + gap for piece, gap in zip(pieces, gaps, strict=True))


def some_positions(num_items: int, share: float, random: Random) -> set[int]:
    """Positions of about `share` of the items, and of one at least if there is any."""
    num_chosen = max(round(share * num_items), min(num_items, 1))
    return set(random.sample(range(num_items), num_chosen))


def shuffled_pieces(pieces: Sequence[str], random: Random) -> list[str]:
    """Another order than theirs; the pieces must not all be the same."""
    moved = list(pieces)
    while moved == pieces:
        random.shuffle(moved)
    return moved
