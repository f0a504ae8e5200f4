"""A request is refused as a whole for what its program does wrong, a sample for what it is."""

import json
import re

import pytest

from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.records import Message, RejectedRow, UnscoredSample
from serve.error_responses import RequestError
from serve.request_parsing import parse_request

GOOD = {"prompt": "a question", "response": "an answer"}


def parse(content, *, max_samples=10):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse_request(body, max_samples=max_samples)


def refusal(content, **limits):
    with pytest.raises(RequestError) as caught:
        parse(content, **limits)
    return caught.value


@pytest.mark.parametrize(
    ("wire", "roles"),
    [
        ({"text": "said"}, ["assistant"]),
        (GOOD, ["user", "assistant"]),
        ({"messages": [{"role": "assistant", "content": "said"}]}, ["assistant"]),
    ],
)
def test_each_layout_becomes_a_conversation(wire, roles):
    parsed = parse({"samples": {**wire, "id": "x", "dataset": "d"}})
    [only] = parsed.samples
    assert [message.role for message in only.sample.messages] == roles
    assert (only.wire_id, only.sample.dataset, parsed.is_list) == ("x", "d", False)


def test_a_list_keeps_its_order_and_its_bad_samples_beside_the_good():
    parsed = parse(
        {
            "samples": [
                {**GOOD, "id": "0"},
                {"id": "1", "text": 5},
                {"id": "2", "messages": []},
                {"id": "3", "messages": [{"role": "user", "content": "no answer"}]},
                "no object",
                {"id": "5", "nothing": "known"},
                {**GOOD, "id": "6"},
            ],
            "detail": "tokens",
        }
    )
    assert [isinstance(entry.sample, UnscoredSample) for entry in parsed.samples] == [
        False, True, True, True, True, True, False,
    ]  # fmt: skip
    assert [entry.wire_id for entry in parsed.samples] == ["0", "1", "2", "3", None, "5", "6"]
    assert parsed.options.detail == "tokens"
    errors = [getattr(entry.sample, "detail", "") for entry in parsed.samples]
    assert errors[1] == "samples[1]: 'text' must be text, got int 5"
    assert errors[2] == "samples[2]: 'messages' must not be empty"
    assert "samples[3]: a row must have an assistant turn" in errors[3]
    assert errors[4] == "samples[4]: a row must be a JSON object, got str 'no object'"
    assert "samples[5]: a row must have messages, " in errors[5]
    assert "got the keys ['id', 'nothing']" in errors[5]
    assert [getattr(entry.sample, "reason", "") for entry in parsed.samples] == [
        "", "messages_wrong_type", "messages_empty", "no_assistant_turn", "not_an_object",
        "unknown_layout", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "the body must be JSON in UTF-8"),
        (b"\xff", "the body must be JSON in UTF-8"),
        (b"[" * 100_000, "the body must be JSON in UTF-8"),
        (b"1" * 10_000, "the body must be JSON in UTF-8"),
        ([], "the body must be a JSON object with 'samples', got a list"),
        ({}, "samples must be a sample or a list of samples, got nothing"),
        ({"samples": None}, "got null"),
        ({"samples": []}, "samples must not be empty"),
        (
            {"samples": GOOD, "sample": 1},
            "sample: is not a field here; known are detail, batching, samples",
        ),
        ({"samples": GOOD, "detail": "all"}, "detail: must be 'sample', 'layers' or 'tokens'"),
        ({"samples": GOOD, "detail": ["tokens"]}, "detail: must be"),
        ({"samples": {"promt": "x", "response": "y"}}, r"got the keys \['promt', 'response'\]"),
        ({"samples": {"prompt": "x"}}, "samples: a row must have messages, "),
        ({"samples": {"text": " "}}, "the assistant must say something"),
        ({"samples": {"text": "\ud83d"}}, "lone surrogate"),
        ({"samples": {**GOOD, "id": "\ud83d"}}, "'id' must be valid Unicode"),
        (
            {"samples": [{"foo": 1}, {"bar": 2}]},
            r"samples\[0\]: a row must have messages, .*\['foo'\]",
        ),
        (
            {"samples": {"messages": [{"role": "narrator", "content": "x"}]}},
            r"samples: messages\[0\].role must be one of system, user, assistant, tool",
        ),
    ],
)
def test_what_is_wrong_is_a_422_that_names_the_field(content, complaint):
    error = refusal(content)
    assert error.error_type == "validation"
    assert re.search(complaint, str(error)), str(error)


@pytest.mark.parametrize("place", ["top", "sample"])
@pytest.mark.parametrize("field", ["text_1", "text_2", "query", "documents"])
def test_fields_of_pair_scoring_get_a_pointer(field, place):
    content = {field: "a"} if place == "top" else {"samples": [{field: "a"}]}
    error = refusal(content)
    assert field in str(error)
    assert "scores single samples" in str(error)


def test_a_list_that_is_too_long_is_too_large():
    assert refusal({"samples": [GOOD] * 3}, max_samples=2).error_type == "too_large"


def test_a_message_that_no_file_could_hold_does_not_break_the_answer():
    error = refusal({"samples": {"\ud83d": 1}})
    error.response().body.decode("utf-8")


def test_the_sample_is_the_one_that_the_select_job_reads():
    [only] = parse({"samples": GOOD}).samples
    assert only.sample.messages == (
        Message("user", "a question"),
        Message("assistant", "an answer"),
    )


CORPUS_ROWS = {
    "whole-number id": ({**GOOD, "id": 7}, "7"),
    "extra keys": ({**GOOD, "id": "a", "source": "mine", "category": None}, "a"),
    "row of selected_data.jsonl": (
        {
            "dataset": "d",
            "id": "a",
            "messages": [
                {"role": "user", "content": "a question"},
                {"role": "assistant", "content": "an answer"},
            ],
            "score": 0.5,
            "percentile": 50.0,
        },
        "a",
    ),
    "Alpaca": ({"instruction": "a question", "input": "", "output": "an answer"}, None),
    "Dolly": ({"instruction": "a question", "context": None, "response": "an answer"}, None),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "a question"},
                {"from": "gpt", "value": "an answer"},
            ]
        },
        None,
    ),
    "TRL": ({"prompt": "a question", "completion": "an answer"}, None),
    "parts and a name": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a question"}],
                    "name": "bob",
                },
                {"role": "assistant", "content": "an answer"},
            ]
        },
        None,
    ),
}


@pytest.mark.parametrize("name", CORPUS_ROWS)
def test_a_row_of_a_corpus_is_a_sample(name):
    wire, wire_id = CORPUS_ROWS[name]
    [only] = parse({"samples": wire}).samples
    assert only.wire_id == wire_id
    assert [(m.role, m.content) for m in only.sample.messages] == [
        ("user", "a question"),
        ("assistant", "an answer"),
    ]
    assert only.sample.extra_columns == ""


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ({**GOOD, "response": " \u200b"}, "empty_answer"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "no_assistant_turn"),
        ({**GOOD, "prompt": "\ud83d"}, "lone_surrogate"),
        ({"messages": [{"role": "gpt", "content": "a", "weight": 0}]}, "no_trained_turn"),
        ({"nothing": 1}, "unknown_layout"),
    ],
)
def test_the_reason_of_a_bad_sample_is_that_of_rejected_jsonl(wire, reason):
    _, bad = parse({"samples": [GOOD, {**wire, "id": 1}]}).samples
    assert isinstance(bad.sample, UnscoredSample)
    assert (bad.wire_id, bad.sample.reason) == ("1", reason)
    row = parse_row({**wire, "id": 1}, RowLocation("a.jsonl", 1, "a"))
    assert isinstance(row, RejectedRow)
    assert (row.reason, f"samples[1]: {row.detail}") == (reason, bad.sample.detail)
