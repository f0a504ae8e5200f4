"""The answer of a row without its prompt, which PMI compares it with.

PMI = NLL(answer alone) - NLL(answer given the prompt), both in nats per answer token: how much the
prompt helps to predict the answer. Alone means: under the same chat template, with empty prompts.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from selectmoe.config.engine import Turns
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.message_fields import is_answer
from selectmoe.records import Message, Sample, TokenizedSample, UnscoredSample

Outcome = TokenizedSample | UnscoredSample


def has_prompt(sample: Sample, turns: Turns) -> bool:
    """True where something is said beside the answers."""
    messages = sample.messages
    answers = [index for index, message in enumerate(messages) if is_answer(message)]
    counted = answers[-1:] if turns == "last" else answers
    return bool(sample.tools) or any(
        index not in counted and (message.content.strip() or message.fields)
        for index, message in enumerate(messages)
    )


def without_prompt(sample: Sample, turns: Turns) -> Sample:
    """The same turns, all empty but the answers; with turns "last" only those next to the last
    answer, as an empty answer is none."""
    messages = list(sample.messages)
    if turns == "last":
        last = max(index for index, message in enumerate(messages) if is_answer(message))
        first = 1 if messages[0].role == "system" else 0
        before = [m for m in messages[first:last] if m.role == "user"][-1:]
        messages = [*messages[:first], *before, messages[last]]
    emptied = (m if is_answer(m) else Message(m.role, "") for m in messages)
    return replace(sample, messages=tuple(emptied), tools="")


def with_answers_alone(
    tokenizer: ChatTokenizer, samples: Sequence[Sample], outcomes: Sequence[Outcome]
) -> list[Outcome]:
    """The outcomes of tokenization with the answer alone beside them (`answer_alone`).

    There is none for a row without a prompt, nor where the template or the tokenizer do not give
    the answer the same tokens without its prompt: two sets of tokens have no comparable NLL.
    """
    positions = [
        position
        for position, (sample, outcome) in enumerate(zip(samples, outcomes, strict=True))
        if isinstance(outcome, TokenizedSample) and has_prompt(sample, tokenizer.turns)
    ]
    alone = tokenizer.tokenize_each(
        [without_prompt(samples[position], tokenizer.turns) for position in positions]
    )
    completed = list(outcomes)
    for position, entry in zip(positions, alone, strict=True):
        whole = completed[position]
        if isinstance(entry, TokenizedSample) and isinstance(whole, TokenizedSample):
            completed[position] = replace(whole, answer_alone=same_answer(whole, entry))
    return completed


def same_answer(whole: TokenizedSample, alone: TokenizedSample) -> TokenizedSample | None:
    """`alone` up to the last answer token that `whole` has; None where their tokens differ.

    A prompt takes room, so more of `whole` may be truncated.
    """
    answer = whole.token_ids[whole.answer_mask]
    counted = np.flatnonzero(alone.answer_mask)[: len(answer)]
    if not len(counted) or not np.array_equal(alone.token_ids[counted], answer):
        return None
    end = int(counted[-1]) + 1
    return replace(
        alone, token_ids=alone.token_ids[:end], answer_mask=alone.answer_mask[:end], truncated=False
    )
