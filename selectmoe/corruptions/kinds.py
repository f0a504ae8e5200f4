"""Corrupted copies of a sample, by kind: the negatives from which the gates learn.

Only assistant turns that are trained on are changed, all those that a kind can corrupt. A copy
keeps the dataset, and its id is that of the sample with "#<kind>" appended. A kind that cannot
corrupt a sample (an answer of one word cannot be shuffled) gives None. A copy depends on the seed,
the kind, the sample and the set of donors, not on the order of the donors.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

from selectmoe.corruptions import content, form, replies
from selectmoe.corruptions.text_pieces import Donors
from selectmoe.data.message_fields import is_answer
from selectmoe.records import Sample

# A kind maps (answer, question, other samples, random) to a corrupted answer, or None.
Corruption = Callable[[str, str, Donors, Random], str | None]

CORRUPTIONS: dict[str, Corruption] = {
    "shuffled_words": form.shuffled_words,
    "shuffled_sentences": form.shuffled_sentences,
    "gibberish": form.gibberish,
    "truncated": form.truncated,
    "repeated": form.repeated,
    "dropped_words": form.dropped_words,
    "other_answer": content.other_answer,
    "mixed_answers": content.mixed_answers,
    "wrong_script": form.wrong_script,
    "refusal": content.refusal,
    "echoed_question": content.echoed_question,
    "mojibake": form.mojibake,
    "typos": form.typos,
    "run_on": form.run_on,
    "markup_noise": form.markup_noise,
    "wrong_numbers": content.wrong_numbers,
    "similar_answer": content.similar_answer,
    "other_turn": content.other_turn,
    "rambling": content.rambling,
    "shortened": content.shortened,
    "wrong_conclusion": content.wrong_conclusion,
    "swapped_names": content.swapped_names,
    "swapped_words": content.swapped_words,
    "punctuation": replies.punctuation,
    "placeholder": replies.placeholder,
    "preamble": replies.preamble,
    "link": replies.link,
    "one_word": replies.one_word,
    "one_number": replies.one_number,
}
# What gates on a base are shown by default. Without cut answers, other answers and wrong facts they
# saw more of the faults that nothing was trained on, and ranked revisions and arguments more as
# people do, on both halves of the data; pairs and rated rows gained on neither or one of them
# (docs/experiments.md, "what teaches gates on a real base").
KINDS_FOR_BASES = (
    "shuffled_words", "shuffled_sentences",
    "gibberish", "typos", "mojibake", "wrong_script",
    "repeated", "rambling", "markup_noise", "run_on",
    "refusal", "echoed_question",
    "punctuation", "placeholder", "preamble", "link", "one_word", "one_number",
)  # fmt: skip
_OWN_TURNS = "other_turn"  # the kind whose donor is the sample itself


def corrupt(
    sample: Sample,
    *,
    kind: str,
    seed: int,
    donors: Donors,
    kinds: Mapping[str, Corruption] = CORRUPTIONS,
) -> Sample | None:
    """A copy of `sample` corrupted by `kind`; None if that is not possible.

    donors: other samples of the corpus, whose answers some kinds use.
    """
    corruption = kinds[kind]
    text = "\0".join((str(seed), kind, sample.sample_id, *(m.content for m in sample.messages)))
    random = Random(hashlib.blake2b(text.encode(), digest_size=8).digest())
    others = [donor for donor in donors if donor.sample_id != sample.sample_id]
    if kind == _OWN_TURNS:
        others = [sample]
    messages, changed, question = [], False, ""
    for message in sample.messages:
        if is_answer(message):
            answer = corruption(message.content, question, others, random)
            # Compared word by word: a change of white space alone is no corruption.
            if answer is not None and answer.split() not in ([], message.content.split()):
                message = replace(message, content=answer)
                changed = True
        elif message.role != "assistant":
            question = message.content
        messages.append(message)
    if not changed:
        return None
    return replace(sample, sample_id=f"{sample.sample_id}#{kind}", messages=tuple(messages))
