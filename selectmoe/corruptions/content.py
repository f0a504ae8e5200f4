"""Corruptions of the content of an answer, whose sentences may be well formed.

Each function is a `Corruption` (see kinds.py).
"""

import itertools
import re
import unicodedata
from functools import lru_cache
from random import Random

from selectmoe.corruptions.text_pieces import (
    LONG_WORD,
    MIN_WORDS,
    Donors,
    join_pieces,
    some_positions,
    split_sentences,
    split_words,
)

_FOREIGN_SHARE = 0.5
_SWAPPED_SHARE = 0.25
_RAMBLING_SHARE = (0.3, 1.0)
# A capitalized word that does not begin a sentence: it follows a lower-case letter or a comma.
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}")


def _foreign_pairs(answer: str, question: str, others: Donors) -> list[tuple[str, str]]:
    """(answer, question) of samples with other questions, in sorted order."""
    pairs = {
        (donor.messages[-1].content, donor.messages[-2].content if len(donor.messages) > 1 else "")
        for donor in others
        if donor.messages[-1].role == "assistant"
        and all(m.content.strip() != question.strip() for m in donor.messages if m.role == "user")
    }
    return sorted(pair for pair in pairs if pair[0].strip() and pair[0] != answer)


def _foreign_answers(answer: str, question: str, others: Donors) -> list[str]:
    """Unique answers of samples with other questions, in sorted order."""
    return sorted({text for text, _ in _foreign_pairs(answer, question, others)})


def other_answer(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """The answer to another question, of the most similar length among a few."""
    answers = _foreign_answers(answer, question, others)
    candidates = random.sample(answers, min(8, len(answers)))
    return min(candidates, key=lambda text: abs(len(text) - len(answer)), default=None)


def similar_answer(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """The answer to the most similar other question, by the long words that both share."""
    asked = _long_words(question)
    best, most = None, 0.0
    for text, other_question in _foreign_pairs(answer, question, others):
        theirs = _long_words(other_question)
        # Divided by the square root, since a long question shares words with every other one.
        shared = len(asked & theirs) / max(len(theirs), 1) ** 0.5
        if shared > most:
            best, most = text, shared
    return best


@lru_cache(maxsize=65_536)
def _long_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(LONG_WORD, text.lower()))


def other_turn(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Another assistant turn of the same conversation: `others` is the sample itself."""
    turns = {m.content for donor in others for m in donor.messages if m.role == "assistant"}
    candidates = sorted(text for text in turns - {answer} if text.strip())
    return random.choice(candidates) if candidates else None


def mixed_answers(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Half of the sentences are replaced by sentences of the answer to another question."""
    sentences, gaps = split_sentences(answer)
    answers = _foreign_answers(answer, question, others)
    if len(sentences) < 2 or not answers:
        return None
    foreign, _ = split_sentences(random.choice(answers))
    for position in sorted(some_positions(len(sentences), _FOREIGN_SHARE, random)):
        sentences[position] = random.choice(foreign)
    return join_pieces(sentences, gaps)


def rambling(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """The answer continues with sentences of the answer to another question."""
    answers = _foreign_answers(answer, question, others)
    if not answer.strip() or not answers:
        return None
    foreign, _ = split_sentences(random.choice(answers))
    room = max(random.uniform(*_RAMBLING_SHARE) * len(answer), 1)
    added: list[str] = []
    while sum(map(len, added)) < room and len(added) < len(foreign):
        added.append(foreign[len(added)])
    return " ".join([answer.rstrip(), *added])


def shortened(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Only the first sentences, which are correct but incomplete."""
    sentences, gaps = split_sentences(answer)
    if len(sentences) < 2 or len(split_words(answer)[0]) < 2 * MIN_WORDS:
        return None
    kept = random.randint(1, max(len(sentences) // 2, 1))
    return join_pieces(sentences[:kept], gaps[:kept]).rstrip()


def wrong_conclusion(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """The last sentence is replaced by that of the answer to another question."""
    sentences, gaps = split_sentences(answer)
    endings = [split_sentences(text)[0][-1] for text in _foreign_answers(answer, question, others)]
    endings = [ending for ending in endings if ending != (sentences or [""])[-1]]
    if len(sentences) < 2 or not endings:
        return None
    return join_pieces([*sentences[:-1], random.choice(endings)], gaps)


def swapped_names(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Every name is replaced consistently by a name from other answers."""
    names = set(re.findall(_NAME, answer))
    foreign = {name for text in _foreign_answers(answer, question, others) for name in _names(text)}
    candidates = sorted(foreign - names)
    if not names or not candidates:
        return None
    swapped = {name: random.choice(candidates) for name in sorted(names)}
    return re.sub(r"\b[A-Z][a-z]{2,}", lambda match: swapped.get(match[0], match[0]), answer)


@lru_cache(maxsize=65_536)
def _names(text: str) -> frozenset[str]:
    return frozenset(re.findall(_NAME, text))


def swapped_words(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """A quarter of the long words are replaced by long words of another answer."""
    num_words = len(re.findall(LONG_WORD, answer))
    donors = [text for text in _foreign_answers(answer, question, others) if _long_words(text)]
    if num_words < MIN_WORDS or not donors:
        return None
    foreign = sorted(_long_words(random.choice(donors)))
    chosen = some_positions(num_words, _SWAPPED_SHARE, random)
    number = itertools.count()

    def swapped(match: re.Match[str]) -> str:
        if next(number) not in chosen:
            return match[0]
        word = random.choice(foreign)
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub(LONG_WORD, swapped, answer)


def refusal(answer: str, question: str, others: Donors, random: Random) -> str | None:
    return f"{random.choice(_REFUSAL_OPENINGS)} {random.choice(_REFUSAL_ENDINGS)}".rstrip()


def echoed_question(answer: str, question: str, others: Donors, random: Random) -> str | None:
    if len(split_words(question)[0]) < MIN_WORDS:
        return None
    return question[: max(len(answer), 200)].rstrip()


def wrong_numbers(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """Every digit is replaced by another one."""

    def other_digit(match: re.Match[str]) -> str:
        digit = unicodedata.decimal(match[0])
        # The digits of a script are consecutive code points, beginning with 0.
        return chr(ord(match[0]) + (digit + random.randint(1, 9)) % 10 - digit)

    return re.sub(r"\d", other_digit, answer)


_REFUSAL_OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "Unfortunately I am not able to answer this question.",
    "I cannot assist with this request.",
    "Sorry, this is something that I am unable to do.",
    "I don't have an answer to that.",
    "As a language model I have no opinion on this.",
)
_REFUSAL_ENDINGS = (
    "Please ask me something else.",
    "Please consult a professional.",
    "Is there anything else I can do for you?",
    "Please try again later.",
    "I do not have access to that information.",
    "",
)
