"""Known-worse copies of a sample, by kind: what the gates learn to tell from the real one.

Only what the assistant says is changed, in every assistant turn. A copy keeps the data set, and
its id is the sample's with "#<kind>" behind it. A kind that cannot make a sample worse (an answer
of one word cannot be shuffled) gives None. The same seed, kind and sample give the same copy.
"""

import hashlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from selectmoe.records import Message, Sample

MIN_WORDS = 4
_TRUNCATED_SHARE = (0.2, 0.5)
_DROPPED_SHARE = 0.3
_GIBBERISH_SHARE = 0.3

# A kind maps (answer, its question, other samples, random) to a worse answer, or None.
Corruption = Callable[[str, str, Sequence[Sample], Random], str | None]


def corrupt(sample: Sample, *, kind: str, seed: int, donors: Sequence[Sample]) -> Sample | None:
    """A copy of `sample` made worse in the way of `kind`; None where that is not possible.

    donors: other samples of the corpus, whose answers "other_answer" takes.
    """
    corruption = CORRUPTIONS[kind]
    random = _random_for(sample, kind, seed)
    others = [donor for donor in donors if donor.sample_id != sample.sample_id]
    messages, changed, question = [], False, ""
    for message in sample.messages:
        if message.role == "assistant":
            worse = corruption(message.content, question, others, random)
            if worse is not None and worse.strip() and worse.strip() != message.content.strip():
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


def _words(answer: str) -> list[str]:
    """Words with the white space that follows each, so that joining them is the answer again."""
    return re.findall(r"\S+\s*", answer)


def _shuffled_words(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    words = answer.split()
    if len(words) < MIN_WORDS:
        return None
    random.shuffle(words)
    return " ".join(words)


def _shuffled_sentences(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    sentences = re.split(r"(?<=[.!?])\s+|\n+", answer)
    if len(sentences) < 3:
        return None
    random.shuffle(sentences)
    return " ".join(sentences)


def _gibberish(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Every word becomes letters by chance, or a third of them do."""
    share = random.choice((_GIBBERISH_SHARE, 1.0))
    words = [
        "".join(random.choices(string.ascii_lowercase, k=len(word)))
        if random.random() < share
        else word
        for word in answer.split()
    ]
    return " ".join(words)


def _truncated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """The beginning only, stopping inside a sentence."""
    words = _words(answer)
    if len(words) < 2 * MIN_WORDS:
        return None
    kept = max(int(len(words) * random.uniform(*_TRUNCATED_SHARE)), 2)
    return "".join(words[:kept]).rstrip(" \n.!?")


def _repeated(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Falls into a loop: one phrase takes the place of all that follows it."""
    words = _words(answer)
    if len(words) < MIN_WORDS:
        return None
    length = random.randint(2, min(12, len(words)))
    start = random.randrange(max(len(words) // 2, 1))
    phrase = "".join(words[start : start + length]).rstrip() + " "
    room = max(len(answer) - len("".join(words[:start])), 3 * len(phrase))
    return ("".join(words[:start]) + phrase * (room // len(phrase))).rstrip()


def _dropped_words(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    words = answer.split()
    if len(words) < MIN_WORDS:
        return None
    return " ".join(word for word in words if random.random() >= _DROPPED_SHARE)


def _other_answer(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Another question's answer, of the most similar length among a few."""
    answers = [
        donor.messages[-1].content for donor in others if donor.messages[-1].role == "assistant"
    ]
    candidates = random.sample(answers, min(8, len(answers)))
    return min(candidates, key=lambda text: abs(len(text) - len(answer)), default=None)


def _wrong_script(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Letters of another script in place of the Latin ones: readable to nobody."""
    if sum(letter in string.ascii_letters for letter in answer) < len(answer) / 2:
        return None
    script = random.choice(_SCRIPTS)
    return answer.lower().translate(str.maketrans(string.ascii_lowercase, script))


def _refusal(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    return f"{random.choice(_REFUSAL_OPENINGS)} {random.choice(_REFUSAL_ENDINGS)}"


def _echoed_question(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    return question[: max(len(answer), 200)] if len(question.split()) >= MIN_WORDS else None


def _mojibake(answer: str, question: str, others: Sequence[Sample], random: Random) -> str | None:
    """Damaged encoding: some letters became two or three signs."""
    if len(answer) < 12:
        return None
    return "".join(
        random.choice(_MOJIBAKE) if letter.isalpha() and random.random() < 0.08 else letter
        for letter in answer
    )


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
    words = _words(answer)
    if len(words) < MIN_WORDS:
        return None
    for _ in range(max(len(words) // 8, 2)):
        words.insert(random.randrange(len(words) + 1), random.choice(_MARKUP) + " ")
    return "".join(words)


def _wrong_numbers(
    answer: str, question: str, others: Sequence[Sample], random: Random
) -> str | None:
    """Every number is another one of as many digits."""
    return (
        re.sub(r"\d", lambda match: random.choice("0123456789"), answer)
        if (re.search(r"\d", answer))
        else None
    )


CORRUPTIONS: dict[str, Corruption] = {
    "shuffled_words": _shuffled_words,
    "shuffled_sentences": _shuffled_sentences,
    "gibberish": _gibberish,
    "truncated": _truncated,
    "repeated": _repeated,
    "dropped_words": _dropped_words,
    "other_answer": _other_answer,
    "wrong_script": _wrong_script,
    "refusal": _refusal,
    "echoed_question": _echoed_question,
    "mojibake": _mojibake,
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
_MOJIBAKE = ("Ã©", "â€™", "Â", "ï¿½", "â€œ", "Ã¼", "\ufffd", "&#39;")
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
