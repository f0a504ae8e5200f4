"""Corruptions of the form of an answer: of the order of words and sentences, and of characters.

Line breaks and indentation are kept unless the kind is about them; otherwise a gate would learn to
detect those alone. Each function is a `Corruption` (see kinds.py).
"""

import itertools
import re
import string
from random import Random

from selectmoe.corruptions.text_pieces import (
    LONG_WORD,
    MIN_WORDS,
    Donors,
    join_pieces,
    shuffled_pieces,
    some_positions,
    split_sentences,
    split_words,
)

_TRUNCATED_SHARE = (0.2, 0.5)
_DROPPED_SHARE = 0.3
_GIBBERISH_SHARE = 0.3
_MOJIBAKE_SHARE = 0.06
_TYPO_SHARE = 0.25
_MARKUP_SHARE = 0.15
_LIST_OR_CODE = re.compile(r"^\s*(?:[-*\u2022\u2013]|\d+[.)])\s|^```|^(?: {4}|\t)", re.MULTILINE)


def shuffled_words(answer: str, question: str, others: Donors, random: Random) -> str | None:
    words, gaps = split_words(answer)
    if len(words) < MIN_WORDS or len(set(words)) == 1:
        return None
    return join_pieces(shuffled_pieces(words, random), gaps)


def shuffled_sentences(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Not for lists and code: their lines are not sentences, and lists may be in any order."""
    sentences, gaps = split_sentences(answer)
    if len(sentences) < 3 or len(set(sentences)) == 1 or len(_LIST_OR_CODE.findall(answer)) > 1:
        return None
    return join_pieces(shuffled_pieces(sentences, random), gaps)


def gibberish(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """All words, or a third of them, become random letters."""
    words, gaps = split_words(answer)
    if not words:
        return None
    for position in sorted(
        some_positions(len(words), random.choice((_GIBBERISH_SHARE, 1.0)), random)
    ):
        letters = random.choices(string.ascii_lowercase, k=len(words[position]))
        words[position] = "".join(letters)
    return join_pieces(words, gaps)


def truncated(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Only the beginning, which ends inside a sentence and half of the time inside a word."""
    words, gaps = split_words(answer)
    if len(words) < 2 * MIN_WORDS:
        return None
    kept = max(int(len(words) * random.uniform(*_TRUNCATED_SHARE)), 2)
    last = words[kept - 1]
    if len(last) > 3 and random.random() < 0.5:
        words[kept - 1] = last[: random.randint(1, len(last) - 1)]
    return join_pieces(words[:kept], gaps[:kept]).rstrip(_ENDINGS)


def repeated(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """A loop: one phrase is repeated instead of the text that follows it."""
    words, gaps = split_words(answer)
    if len(words) < MIN_WORDS:
        return None
    length = random.randint(2, min(12, len(words)))
    start = random.randrange(len(words) // 2)
    before = join_pieces(words[:start], gaps[:start])
    loop = slice(start, start + length)
    phrase = join_pieces(words[loop], gaps[loop]).rstrip() + (" " if any(gaps) else "")
    room = max(len(answer) - len(before), 3 * len(phrase))
    return (before + phrase * (room // len(phrase))).rstrip()


def dropped_words(answer: str, question: str, others: Donors, random: Random) -> str | None:
    words, gaps = split_words(answer)
    if len(words) < MIN_WORDS:
        return None
    dropped = some_positions(len(words), _DROPPED_SHARE, random)
    kept = [position for position in range(len(words)) if position not in dropped]
    return join_pieces([words[n] for n in kept], [gaps[n] for n in kept])


def wrong_script(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Latin letters are replaced by letters of another script, which makes the text unreadable."""
    if sum(letter in string.ascii_letters for letter in answer) < len(answer) / 2:
        return None
    script = random.choice(_SCRIPTS)
    return answer.lower().translate(str.maketrans(string.ascii_lowercase, script))


def mojibake(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """UTF-8 decoded as Windows-1252: all non-ASCII characters, and a few that were ASCII."""
    characters = list(answer)
    if len(characters) < 12:
        return None
    for position in sorted(some_positions(len(characters), _MOJIBAKE_SHARE, random)):
        if characters[position].isascii():
            characters[position] = random.choice(
                _ACCENTED if characters[position].isalnum() else _TYPOGRAPHIC
            )
    return "".join(characters).encode().decode("cp1252", errors="replace")


def typos(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """In some words a letter is doubled, dropped, or swapped with the next one."""
    chosen = some_positions(len(re.findall(LONG_WORD, answer)), _TYPO_SHARE, random)
    number = itertools.count()

    def typed(match: re.Match[str]) -> str:
        word = match[0]
        if next(number) not in chosen:
            return word
        at = random.randrange(1, len(word) - 1)
        first, second = word[at], word[at + 1]
        slip = random.choice((second + first, first + first + second, second))
        return word[:at] + slip + word[at + 2 :]

    return re.sub(LONG_WORD, typed, answer)


def run_on(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Lower case, no punctuation, and some words joined."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation)).split()
    if len(bare) < MIN_WORDS:
        return None
    return "".join(word + ("" if random.random() < 0.25 else " ") for word in bare).strip()


def markup_noise(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Remains of a scraped web page between the words."""
    words, gaps = split_words(answer)
    if len(words) < MIN_WORDS:
        return None
    for position in sorted(some_positions(len(words), _MARKUP_SHARE, random)):
        words[position] = f"{random.choice(_MARKUP)} {words[position]}"
    return join_pieces(words, gaps)


_SCRIPTS = (
    "абцдефгхијклмнопярстуввхуз",
    "αβξδεφγηιϊκλμνοπψρστυώωχύζ",
    "אבגדהוזחטיכלמנסעפצקרשתםןףץ",
)
_ENDINGS = " \n.!?\u2026\u3002\uff01\uff1f"
_ACCENTED = "éèüñáç"
_TYPOGRAPHIC = "\u2019\u201c\u201d\u2013\u2014\u2026\u00a0\ufeff"
_MARKUP = (
    "</div>",
    "<br/>",
    "&nbsp;",
    "Click here",
    "[edit]",
    '<p class="x">',
    "Share on",
    "Cookie settings",
    "{{",
    "}}",
    "Advertisement",
    "\\n\\n",
    "Read more »",
    "null",
)
