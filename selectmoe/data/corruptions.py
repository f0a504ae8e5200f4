"""Known-worse copies of a sample, by kind: what the gates learn to tell from the real one.

Only what the assistant says is changed, in every assistant turn that a kind can make worse. A copy
keeps the data set, and its id is the sample's with "#<kind>" behind it. A kind that cannot make a
sample worse (an answer of one word cannot be shuffled) gives None. The same seed, kind, sample and
set of donors give the same copy, whatever the donors' order. Line breaks and indentation stay where
they were unless the kind is about them: else a gate would learn to look for those alone.
"""

import hashlib
import itertools
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from selectmoe.records import Message, Sample

MIN_WORDS = 4
_TRUNCATED_SHARE = (0.2, 0.5)
_DROPPED_SHARE = 0.3
_GIBBERISH_SHARE = 0.3
_MOJIBAKE_SHARE = 0.06
_TYPO_SHARE = 0.25
_MARKUP_SHARE = 0.15
_FOREIGN_SHARE = 0.5

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
_LONG_WORD = re.compile(r"[^\W\d_]{4,}")
_LIST_OR_CODE = re.compile(r"^\s*(?:[-*\u2022\u2013]|\d+[.)])\s|^```|^(?: {4}|\t)", re.MULTILINE)

# A kind maps (answer, its question, other samples, random) to a worse answer, or None.
Corruption = Callable[[str, str, Sequence[Sample], Random], str | None]


def corrupt(sample: Sample, *, kind: str, seed: int, donors: Sequence[Sample]) -> Sample | None:
    """A copy of `sample` made worse in the way of `kind`; None where that is not possible.

    donors: other samples of the corpus, from whose answers "other_answer" and "mixed_answers" take.
    """
    corruption = CORRUPTIONS[kind]
    random = _random_for(sample, kind, seed)
    others = [donor for donor in donors if donor.sample_id != sample.sample_id]
    messages, changed, question = [], False, ""
    for message in sample.messages:
        if message.role == "assistant":
            worse = corruption(message.content, question, others, random)
            # Compared word by word: other white space alone makes nothing worse.
            if worse is not None and worse.split() and worse.split() != message.content.split():
                message = Message("assistant", worse)
                changed = True
        else:
            question = message.content
        messages.append(message)
    if not changed:
        return None
    return replace(sample, sample_id=f"{sample.sample_id}#{kind}", messages=tuple(messages))


def _random_for(sample: Sample, kind: str, seed: int) -> Random:
    text = "\0".join((str(seed), kind, sample.sample_id, *(m.content for m in sample.messages)))
    return Random(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _words(text: str) -> tuple[list[str], list[str]]:
    """The words, and the white space behind each."""
    return _split(_WORD_AND_GAP, text)


def _sentences(text: str) -> tuple[list[str], list[str]]:
    """The sentences, a line break ending one too, and the white space behind each."""
    return _split(_SENTENCE_AND_GAP, text)


def _split(expression: re.Pattern[str], text: str) -> tuple[list[str], list[str]]:
    pairs = expression.findall(text)
    return [piece for piece, _ in pairs], [gap for _, gap in pairs]


def _joined(pieces: Sequence[str], gaps: Sequence[str]) -> str:
    return "".join(piece + gap for piece, gap in zip(pieces, gaps, strict=True))


def _some(num_items: int, share: float, random: Random) -> set[int]:
    """Positions of about `share` of the items, and of one at least if there is any."""
    num_chosen = max(round(share * num_items), min(num_items, 1))
    return set(random.sample(range(num_items), num_chosen))


def _shuffled(pieces: Sequence[str], random: Random) -> list[str]:
    """Another order than theirs; the pieces must not all be the same."""
    shuffled = list(pieces)
    while shuffled == pieces:
        random.shuffle(shuffled)
    return shuffled


def _foreign_answers(answer: str, question: str, others: Sequence[Sample]) -> list[str]:
    """Answers of samples that ask something else, in an order of their own."""
    answers = {
        donor.messages[-1].content
        for donor in others
        if donor.messages[-1].role == "assistant"
        and all(m.content.strip() != question.strip() for m in donor.messages if m.role == "user")
    }
    return sorted(text for text in answers if text.strip() and text != answer)


def _shuffled_words(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    words, gaps = _words(answer)
    if len(words) < MIN_WORDS or len(set(words)) == 1:
        return None
    return _joined(_shuffled(words, random), gaps)


def _shuffled_sentences(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Not of lists and code: their lines are no sentences, and a list has no one order."""
    sentences, gaps = _sentences(answer)
    if len(sentences) < 3 or len(set(sentences)) == 1 or len(_LIST_OR_CODE.findall(answer)) > 1:
        return None
    return _joined(_shuffled(sentences, random), gaps)


def _gibberish(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Every word becomes letters by chance, or a third of them do."""
    words, gaps = _words(answer)
    if not words:
        return None
    for position in sorted(_some(len(words), random.choice((_GIBBERISH_SHARE, 1.0)), random)):
        letters = random.choices(string.ascii_lowercase, k=len(words[position]))
        words[position] = "".join(letters)
    return _joined(words, gaps)


def _truncated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """The beginning only, stopping inside a sentence, half the time inside a word."""
    words, gaps = _words(answer)
    if len(words) < 2 * MIN_WORDS:
        return None
    kept = max(int(len(words) * random.uniform(*_TRUNCATED_SHARE)), 2)
    last = words[kept - 1]
    if len(last) > 3 and random.random() < 0.5:
        words[kept - 1] = last[: random.randint(1, len(last) - 1)]
    return _joined(words[:kept], gaps[:kept]).rstrip(_ENDINGS)


def _repeated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Falls into a loop: one phrase takes the place of all that follows it."""
    words, gaps = _words(answer)
    if len(words) < MIN_WORDS:
        return None
    length = random.randint(2, min(12, len(words)))
    start = random.randrange(len(words) // 2)
    before = _joined(words[:start], gaps[:start])
    loop = slice(start, start + length)
    phrase = _joined(words[loop], gaps[loop]).rstrip() + (" " if any(gaps) else "")
    room = max(len(answer) - len(before), 3 * len(phrase))
    return (before + phrase * (room // len(phrase))).rstrip()


def _dropped_words(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    words, gaps = _words(answer)
    if len(words) < MIN_WORDS:
        return None
    dropped = _some(len(words), _DROPPED_SHARE, random)
    kept = [position for position in range(len(words)) if position not in dropped]
    return _joined([words[n] for n in kept], [gaps[n] for n in kept])


def _other_answer(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Another question's answer, of the most similar length among a few."""
    answers = _foreign_answers(answer, question, others)
    candidates = random.sample(answers, min(8, len(answers)))
    return min(candidates, key=lambda text: abs(len(text) - len(answer)), default=None)


def _mixed_answers(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Sentences of another question's answer in the place of half of its own."""
    sentences, gaps = _sentences(answer)
    answers = _foreign_answers(answer, question, others)
    if len(sentences) < 2 or not answers:
        return None
    foreign, _ = _sentences(random.choice(answers))
    for position in sorted(_some(len(sentences), _FOREIGN_SHARE, random)):
        sentences[position] = random.choice(foreign)
    return _joined(sentences, gaps)


def _wrong_script(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Letters of another script in place of the Latin ones: readable to nobody."""
    if sum(letter in string.ascii_letters for letter in answer) < len(answer) / 2:
        return None
    script = random.choice(_SCRIPTS)
    return answer.lower().translate(str.maketrans(string.ascii_lowercase, script))


def _refusal(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    return f"{random.choice(_REFUSAL_OPENINGS)} {random.choice(_REFUSAL_ENDINGS)}".rstrip()


def _echoed_question(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    if len(_words(question)[0]) < MIN_WORDS:
        return None
    return question[: max(len(answer), 200)].rstrip()


def _mojibake(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """UTF-8 read as Windows-1252: every sign beyond ASCII suffers, and a few that were ASCII."""
    signs = list(answer)
    if len(signs) < 12:
        return None
    for position in sorted(_some(len(signs), _MOJIBAKE_SHARE, random)):
        if signs[position].isascii():
            signs[position] = random.choice(
                _ACCENTED if signs[position].isalnum() else _TYPOGRAPHIC
            )
    return "".join(sign.encode().decode("cp1252", errors="replace") for sign in signs)


def _typos(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """In some words a letter is doubled, left out, or written before the one that it follows."""
    chosen = _some(len(re.findall(_LONG_WORD, answer)), _TYPO_SHARE, random)
    number = itertools.count()

    def typed(match: re.Match[str]) -> str:
        word = match[0]
        if next(number) not in chosen:
            return word
        at = random.randrange(1, len(word) - 1)
        first, second = word[at], word[at + 1]
        slip = random.choice((second + first, first + first + second, second))
        return word[:at] + slip + word[at + 2 :]

    return re.sub(_LONG_WORD, typed, answer)


def _run_on(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Lower case, no punctuation, some words grown together."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation)).split()
    if len(bare) < MIN_WORDS:
        return None
    return "".join(word + ("" if random.random() < 0.25 else " ") for word in bare).strip()


def _markup_noise(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Left-overs of a scraped page between the words."""
    words, gaps = _words(answer)
    if len(words) < MIN_WORDS:
        return None
    for position in sorted(_some(len(words), _MARKUP_SHARE, random)):
        words[position] = f"{random.choice(_MARKUP)} {words[position]}"
    return _joined(words, gaps)


def _wrong_numbers(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Every number is another one of as many digits."""

    def other_digit(match: re.Match[str]) -> str:
        digit = unicodedata.decimal(match[0])
        # Digits of a script stand side by side, 0 first.
        return chr(ord(match[0]) + (digit + random.randint(1, 9)) % 10 - digit)

    return re.sub(r"\d", other_digit, answer)


CORRUPTIONS: dict[str, Corruption] = {
    "shuffled_words": _shuffled_words,
    "shuffled_sentences": _shuffled_sentences,
    "gibberish": _gibberish,
    "truncated": _truncated,
    "repeated": _repeated,
    "dropped_words": _dropped_words,
    "other_answer": _other_answer,
    "mixed_answers": _mixed_answers,
    "wrong_script": _wrong_script,
    "refusal": _refusal,
    "echoed_question": _echoed_question,
    "mojibake": _mojibake,
    "typos": _typos,
    "run_on": _run_on,
    "markup_noise": _markup_noise,
    "wrong_numbers": _wrong_numbers,
}

_SCRIPTS = (
    "абцдефгхијклмнопярстуввхуз",
    "αβξδεφγηιϊκλμνοπψρστυώωχύζ",
    "אבגדהוזחטיכלמנסעפצקרשתםןףץ",
)
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
