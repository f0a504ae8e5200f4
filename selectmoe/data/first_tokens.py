"""The first tokens of a long text, without tokenizing all of it.

A text may be cut between two characters where its first tokens cannot depend on what follows:

1. The pre-tokenizer gives the same pieces left of the cut, the last of them shortened to it. This
   holds for the pre-tokenizers of `tokenizer_rules.py`, next to the characters that
   `_keeps_pieces` accepts.
2. No token crosses the cut. BPE merges pairs by rank, so merges on the left of a boundary that no
   merge crosses do not depend on the right.

For 2 a barrier suffices: two characters that stand side by side in no token of the vocabulary, such
as a letter and the space after it. A text without a barrier (a run of dashes) is cut at every
character of a window that is as wide as the longest token that fits there. The tokens of the whole
text have a boundary in this window, and left of it they are the tokens of the text cut there: what
the tokens of all these beginnings share, the whole text shares.

Texts without such a place are tokenized as a whole, and so are all texts of other tokenizers.
"""

import re
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Encoding, Tokenizer

from selectmoe.data.tokenizer_rules import TokenizerRules, read_rules

CHARACTERS_PER_TOKEN = 8  # the first cut comes after so many characters for each token
GROWTH = 8  # factor of the next cut, where a beginning has too few tokens
SEARCHED_CHARACTERS = 2_000  # left of the limit, for a barrier
MAX_WINDOW = 128  # characters; wider ones cost more than they save
WHITE_SPACE = " \t\n\r"
_IN_CONTRACTION = re.compile(r"'[^\W\d_]+\Z")  # an apostrophe and letters, such as 've


class FirstTokens:
    """Tokenizes the beginning of texts, with the tokens that the whole text has there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def rules(self) -> TokenizerRules | None:
        """Read at the first long text: a large vocabulary takes some tenths of a second."""
        return read_rules(self.tokenizer)

    def encode_each(self, texts: Sequence[str], num_tokens: int) -> list[Encoding]:
        """For each text more than `num_tokens` tokens, of which so many are its first ones; or all
        its tokens, if it has no more. Uses all the threads of the tokenizer."""
        limit = CHARACTERS_PER_TOKEN * max(num_tokens, 1)
        beginnings = [self._beginning(text, limit) for text in texts]
        encodings = self._encode(*beginnings)
        return [
            encoding
            if len(beginning) == len(text) or len(encoding) > num_tokens
            else self._encode_long(text, limit, num_tokens)
            for text, beginning, encoding in zip(texts, beginnings, encodings, strict=True)
        ]

    def _beginning(self, text: str, limit: int) -> str:
        """The text up to a barrier, or all of it where it is short; empty if there is none."""
        if len(text) <= limit:
            return text
        for cut in range(limit, max(limit - SEARCHED_CHARACTERS, 1), -1):
            if self.rules is None:
                break
            if self.rules.is_barrier(text, cut) and _keeps_pieces(self.rules, text, cut):
                return text[:cut]
        return ""

    def _encode_long(self, text: str, limit: int, num_tokens: int) -> Encoding:
        """A text of which the beginning before `limit` was not enough."""
        while limit < len(text) and self.rules is not None:
            encoding = self._encode_window(self.rules, text, limit, num_tokens)
            if encoding is not None:
                return encoding
            limit *= GROWTH
            beginning = self._beginning(text, limit) if limit < len(text) else ""
            [encoding] = self._encode(beginning)
            if len(encoding) > num_tokens:
                return encoding
        return self._encode(text)[0]

    def _encode_window(
        self, rules: TokenizerRules, text: str, limit: int, num_tokens: int
    ) -> Encoding | None:
        """One of the beginnings that end in a window before `limit`, if all share the tokens."""
        [encoding] = self._encode(text[:limit])
        if len(encoding) <= num_tokens or rules.only_between_words:
            return None
        # Near the end of the last token that is needed, so that the beginnings are short.
        start = min(limit, encoding.offsets[num_tokens][1] + MAX_WINDOW)
        width = rules.longest_token(text, start, start + MAX_WINDOW)
        cuts = range(start + 1, start + width + 1)
        window = text[start : start + width + 1]
        if width > MAX_WINDOW or len(window) <= width or not window.isascii():
            return None  # a character that is not ASCII may be several tokens: cuts would miss some
        if not all(_keeps_pieces(rules, text, cut) for cut in cuts):
            return None
        encodings = self._encode(*(text[:cut] for cut in cuts))
        kept = encodings[0].ids[:num_tokens], encodings[0].offsets[:num_tokens]
        are_equal = all(
            len(other) > num_tokens and (other.ids[:num_tokens], other.offsets[:num_tokens]) == kept
            for other in encodings
        )
        return encodings[0] if are_equal else None

    def _encode(self, *texts: str) -> list[Encoding]:
        # `encode` keeps Python's lock, so that other threads would wait for seconds.
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _keeps_pieces(rules: TokenizerRules, text: str, cut: int) -> bool:
    """Whether the pre-tokenizer splits `text[:cut]` as it splits the text up to there."""
    left, right = text[cut - 1], text[cut]
    if rules.is_nfc and not rules.are_nfc_inert(left + right):
        return False
    if left.isspace() or left == "\u180e":  # white space in older versions of Unicode
        # Where a run of white space ends decides how it is split, so both must be inside it.
        if not (rules.cuts_white_space and left in WHITE_SPACE and right in WHITE_SPACE):
            return False
    elif _IN_CONTRACTION.search(text, max(cut - 3, 0), cut + 1):
        return False
    if rules.only_between_words and not (left.isalpha() and right == " " and _is_word(text, cut)):
        return False
    return not rules.crosses_added_token(text, cut)


def _is_word(text: str, cut: int) -> bool:
    return text[cut + 1 : cut + 2].isalpha()
