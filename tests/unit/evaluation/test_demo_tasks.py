"""The rows that ship: whole, of our own, and not what the demo trains on."""

import collections
import json

from selectmoe.evaluation.local_tasks import (
    ANSWER_LOSS_FILES,
    SHIPPED_TASKS,
    check_choices,
    read_conversations,
    read_rows,
)
from selectmoe.paths import DEMO_CORPUS

CHOICES = SHIPPED_TASKS / "demo_choices.jsonl"
CONVERSATIONS = ANSWER_LOSS_FILES["demo_answer_loss"]


def texts(conversation):
    return {message.content.casefold() for message in conversation.messages}


def test_choices_are_120_questions_with_answers_spread_evenly_over_four_places():
    for location, row in read_rows(CHOICES):
        check_choices(location, row)
    rows = [row for _, row in read_rows(CHOICES)]
    assert len({row["question"] for row in rows}) == len(rows) == 120
    assert {len(set(row["choices"])) for row in rows} == {4}
    assert set(collections.Counter(row["answer"] for row in rows).values()) == {30}


def test_the_length_of_a_choice_does_not_give_it_away():
    rows = [row for _, row in read_rows(CHOICES)]
    lengths = [[len(choice) for choice in row["choices"]] for row in rows]
    for extreme in (min, max):
        found = sum(
            row["answer"] == places.index(extreme(places))
            for row, places in zip(rows, lengths, strict=True)
        )
        # A coin with four sides is right 30 times of 120; 45 is three standard deviations above.
        assert found < 45


def test_no_held_out_conversation_is_in_the_demo_corpus():
    held_out = read_conversations(CONVERSATIONS)
    assert len(held_out) == 40
    assert len({sample.sample_id for sample in held_out}) == 40
    trained_on = {text for sample in read_conversations(DEMO_CORPUS) for text in texts(sample)}
    assert not any(texts(sample) & trained_on for sample in held_out)


def test_every_kind_of_the_demo_corpus_is_held_out():
    def kinds(file):
        return {json.loads(line)["kind"] for line in file.read_text("utf-8").splitlines()}

    clean = {
        json.loads(line)["kind"]
        for line in DEMO_CORPUS.read_text("utf-8").splitlines()
        if json.loads(line)["dataset"] == "demo"
    }
    assert kinds(CONVERSATIONS) == clean
