"""Corruptions that leave a reply without content where the question wants sentences.

Each function is a `Corruption` (see kinds.py). An answer that is itself short has no such copy:
"2" may be all that was asked for.
"""

from random import Random

from selectmoe.corruptions.text_pieces import MIN_WORDS, Donors, split_words

_PUNCTUATION = "!?.,;:-*#%)(/&_~|\"'"
_MOST_REPEATS = 3
_PLACEHOLDERS = (
    "N/A", "n/a", "see above", "See below.", "none", "None", "null", "nan", "TBD", "TODO",
    "unknown", "no answer", "empty", "same as above", "ditto", "ok", "maybe", "true", "False",
    "yes", "Yes", "yes.", "Yes.", "no", "No", "no.", "No.",
)  # fmt: skip
_PREAMBLES = (
    "Sure!",
    "Sure, here is the answer:",
    "Of course.",
    "Certainly! Here you go:",
    "Great question!",
    "Here is the answer:",
    "Let me think.",
    "Okay.",
    "As follows:",
    "I will answer that below.",
)
_PATHS = ("", "index.html", "page", "wiki", "watch?v=3")
_LARGEST_NUMBERS = (9, 99, 2_999)


def punctuation(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """One punctuation mark, up to three times."""
    mark, repeats = random.choice(_PUNCTUATION), random.randint(1, _MOST_REPEATS)
    return mark * repeats if _is_long(answer) else None


def placeholder(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """What people and programs write where an answer is missing, or yes or no."""
    return random.choice(_PLACEHOLDERS) if _is_long(answer) else None


def preamble(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """The announcement of an answer, alone."""
    return random.choice(_PREAMBLES) if _is_long(answer) else None


def link(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """A URL, alone."""
    word = _word_of(others, random)
    if word is None or not _is_long(answer):
        return None
    name = "".join(letter for letter in word.lower() if letter.isalnum() and letter.isascii())
    return f"https://www.{name or 'example'}.com/{random.choice(_PATHS)}"


def one_word(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """One word of the answer to another question."""
    return _word_of(others, random) if _is_long(answer) else None


def one_number(answer: str, question: str, others: Donors, random: Random) -> str | None:
    """A whole number of one to four digits."""
    number = random.randint(0, random.choice(_LARGEST_NUMBERS))
    return str(number) if _is_long(answer) else None


def _is_long(answer: str) -> bool:
    return len(split_words(answer)[0]) >= 2 * MIN_WORDS


def _word_of(others: Donors, random: Random) -> str | None:
    """A word of the last message of another sample; None where there is none."""
    texts = {donor.messages[-1].content for donor in others}
    answers = sorted(text for text in texts if text.strip())
    return random.choice(random.choice(answers).split()) if answers else None
