"""What a turn says beside its text, and which turns are trained on."""

import json

import pytest

from selectmoe.data.message_fields import (
    as_json,
    content_key,
    is_answer,
    is_trained,
    reasoning_of,
    tool_calls_of,
)
from selectmoe.data.messages import TurnReader, is_visible, require_answer
from selectmoe.data.row_errors import RowError
from selectmoe.records import Message

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def read(turn: dict) -> Message:
    [message] = TurnReader().read([{"role": "assistant", "content": "Because.", **turn}])
    return message


def refusal(turn: dict) -> RowError:
    with pytest.raises(RowError) as caught:
        require_answer([read(turn)])
    return caught.value


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_and_kept_under_its_name(key):
    message = read({key: " The Moon. "})
    assert reasoning_of(message) == "The Moon."
    assert as_json(message) == {"role": "assistant", "content": "Because.", key: " The Moon. "}
    assert reasoning_of(read({key: [{"type": "text", "text": "Parts."}]})) == "Parts."
    for nothing in ("", None, True, float("nan")):
        assert reasoning_of(read({key: nothing})) == ""


@pytest.mark.parametrize(
    "thought",
    [{"type": "thinking", "thinking": "Moon."}, {"type": "reasoning", "text": "Moon."}],
)
def test_a_part_of_thinking_is_reasoning(thought):
    message = read({"content": [thought, {"type": "text", "text": "Because."}]})
    assert (message.content, reasoning_of(message)) == ("Because.", "Moon.")


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.5}, True),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"loss": False}, False),
        ({"loss": 0.0}, True),  # a measured loss
    ],
)
def test_a_turn_says_whether_it_is_trained_on(fields, trained):
    message = read(fields)
    assert is_trained(message) == is_answer(message) == trained
    if trained:
        require_answer([message])
    else:
        assert refusal(fields).reason == "no_trained_turn"


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": CALL["function"]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
    ],
)
def test_a_tool_call_is_an_answer_without_text(calls):
    message = read({"content": None, **calls})
    require_answer([message])
    assert message.content == ""
    assert [call["function"] for call in tool_calls_of(message)] == [
        {"name": "add", "arguments": {"a": 1}}
    ]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"tool_calls": [{"arguments": "{}"}]}, "tool_calls_wrong_type"),
        ({"tool_calls": ["add"]}, "tool_calls_wrong_type"),
        ({"tool_calls": {"name": "add"}}, "messages_wrong_type"),
        ({"content": None}, "messages_wrong_type"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "messages_wrong_type"),
        ({"reasoning": {"text": "a"}}, "messages_wrong_type"),
        ({"weight": "0"}, "messages_wrong_type"),
        ({"train": "false"}, "messages_wrong_type"),
        ({"reasoning": "\ud800"}, "lone_surrogate"),
        ({"tool_calls": [{"name": "\ud800"}]}, "lone_surrogate"),
        ({"role": "function_call", "content": "add(1)"}, "tool_calls_wrong_type"),
    ],
)
def test_what_cannot_be_read_is_refused(turn, reason):
    assert refusal(turn).reason == reason


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b", "\0", "\ufeff \u2060\u00ad", "\u3164", "\u2800", "\ufe0f\u034f"]
)
def test_an_answer_of_invisible_characters_says_nothing(text):
    assert not is_visible(text)
    assert refusal({"content": text}).reason == "empty_answer"


@pytest.mark.parametrize(
    "text", ["a", "\u200b.", "日", "\U0001f600", "\ufffd", "e\u0301", "\ue000"]
)
def test_an_answer_with_a_visible_character_says_something(text):
    require_answer([read({"content": text})])


def test_an_empty_answer_that_is_not_trained_on_does_not_hide_the_others():
    turns = [
        {"role": "assistant", "content": "Said.", "weight": 0},
        {"role": "assistant", "content": "\u200b"},
    ]
    with pytest.raises(RowError, match="the assistant must say something"):
        require_answer(TurnReader().read(turns))


def test_only_what_is_said_makes_two_messages_different():
    assert content_key(read({"name": "bob", "weight": 1})) == ""
    keys = [
        content_key(read(f)) for f in ({"thinking": "a"}, {"weight": 0}, {"tool_calls": [CALL]})
    ]
    assert len({"", *keys}) == 4
    assert content_key(read({"reasoning": "a"})) == content_key(read({"thinking": " a"}))
