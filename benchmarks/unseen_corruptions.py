"""Kinds of corruption that no recipe and no warm-up trains on, for testing generalization.

Each is a `Corruption` (selectmoe/corruptions/kinds.py). They were chosen as faults that real
corpora have, before any gate was evaluated on them; `negated` was included because it is hard.
"""

import html
import re
from collections.abc import Mapping, Sequence
from random import Random

from selectmoe.corruptions.kinds import Corruption
from selectmoe.corruptions.text_pieces import (
    MIN_WORDS,
    join_pieces,
    some_positions,
    split_sentences,
    split_words,
)
from selectmoe.records import Sample

_MISSING_FRACTION = (0.4, 0.7)
_BROKEN_FRACTION = 0.3
_STUTTERED_FRACTION = 0.2
_STOP_WORD = re.compile(
    r"(an?|and|are|as|at|be|been|but|by|for|from|had|has|have|he|her|his|i|in|is|it|its|of|on|or|she|"
    r"so|that|the|their|them|they|this|to|was|we|were|which|who|will|with|you|your)[.,;:!?]?"
)
_VERB = re.compile(
    r"\b(is|are|was|were|can|could|will|would|should|has|have|does|do|did)\b(?! not)"
)


def missing_start(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Only the end of the answer, starting in the middle of a sentence."""
    words, gaps = split_words(answer)
    if len(words) < 2 * MIN_WORDS:
        return None
    first = int(len(words) * random.uniform(*_MISSING_FRACTION))
    return join_pieces(words[first:], gaps[first:])


def doubled_sentences(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Every sentence twice."""
    sentences, gaps = split_sentences(answer)
    twice = [f"{sentence} {sentence}" for sentence in sentences]
    return join_pieces(twice, gaps) if len(split_words(answer)[0]) >= MIN_WORDS else None


def html_escaped(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """HTML source, escaped twice."""
    paragraphs = "".join(f"<p>{line}</p>" for line in answer.splitlines() if line.strip())
    return html.escape(html.escape(paragraphs)) or None


def all_caps(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    return answer.upper() if len(split_words(answer)[0]) >= MIN_WORDS else None


def hyphenated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Words hyphenated as by the line breaks of a narrow column."""
    words, gaps = split_words(answer)
    long = [position for position, word in enumerate(words) if len(word) >= 6]
    if not long:
        return None
    for chosen in some_positions(len(long), _BROKEN_FRACTION, random):
        word = words[long[chosen]]
        at = random.randint(2, len(word) - 2)
        words[long[chosen]] = f"{word[:at]}- {word[at:]}"
    return join_pieces(words, gaps)


def interleaved(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Sentences alternate with those of another answer, as when two columns are read across."""
    sentences, gaps = split_sentences(answer)
    donors = [donor.messages[-1].content for donor in others]
    foreign, _ = split_sentences(random.choice(donors)) if donors else ([], [])
    if len(sentences) < 2 or len(foreign) < 2:
        return None
    pieces = [f"{own} {foreign[n % len(foreign)]}" for n, own in enumerate(sentences)]
    return join_pieces(pieces, gaps)


def leaked_prompt(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Markers of another chat format around the answer, and the beginning of the next prompt."""
    start, end = random.choice(
        (
            ("### Response:\n", "\n\n### Instruction:\n"),
            ("[INST] ", " [/INST]"),
            ("Assistant: ", "\nHuman: "),
            ("<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"),
        )
    )
    return f"{start}{answer}{end}{question[: random.randint(20, 80)]}"


def dropped_stop_words(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    words, gaps = split_words(answer)
    kept = [n for n, word in enumerate(words) if not _STOP_WORD.fullmatch(word.lower())]
    if len(kept) < MIN_WORDS or len(kept) > 0.8 * len(words):
        return None
    return join_pieces([words[n] for n in kept], [gaps[n] for n in kept])


def stuttered(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    words, gaps = split_words(answer)
    if len(words) < MIN_WORDS:
        return None
    for position in some_positions(len(words), _STUTTERED_FRACTION, random):
        words[position] = f"{words[position]} {words[position]}"
    return join_pieces(words, gaps)


def negated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Negates affirmative clauses, and removes the negation of negative ones."""
    negative = re.sub(_VERB, r"\1 not", answer)
    return negative.replace(" not not", "") if negative != answer else None


UNSEEN_CORRUPTIONS: Mapping[str, Corruption] = {
    "missing_start": missing_start,
    "doubled_sentences": doubled_sentences,
    "html_escaped": html_escaped,
    "all_caps": all_caps,
    "hyphenated": hyphenated,
    "interleaved": interleaved,
    "leaked_prompt": leaked_prompt,
    "dropped_stop_words": dropped_stop_words,
    "stuttered": stuttered,
    "negated": negated,
}
