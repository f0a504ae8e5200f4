"""The input contract: which rows are samples, and what is said of those that are not."""

import datetime
import decimal
import itertools
import json

import numpy as np
import pytest

from selectmoe.config.columns import ColumnRules
from selectmoe.data.messages import ROLES, TurnReader, require_answer
from selectmoe.data.row_errors import RowError, abridge
from selectmoe.data.rows import MAX_NAME_CHARACTERS, RowLocation, parse_row
from selectmoe.records import Message, RejectedRow, Sample

PLACE = RowLocation("/corpora/tulu.jsonl", 7, "tulu")
ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "Because."}
DIALOGUE = (Message("user", "Why?"), Message("assistant", "Because."))


def rejected(row: object) -> RejectedRow:
    outcome = parse_row(row, PLACE)
    assert isinstance(outcome, RejectedRow), outcome
    assert (outcome.file, outcome.row) == ("/corpora/tulu.jsonl", 7)
    return outcome


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASKED, ANSWERED]}, DIALOGUE),
        ({"instruction": "Why?", "input": "", "output": "Because."}, DIALOGUE),
        ({"instruction": "Why?", "output": "Because."}, DIALOGUE),
        ({"instruction": "Why?", "context": None, "response": "Because."}, DIALOGUE),
        ({"prompt": "Why?", "response": "Because."}, DIALOGUE),
        ({"text": "Because."}, DIALOGUE[1:]),
    ],
    ids=["messages", "alpaca", "alpaca without input", "dolly", "prompt and response", "text"],
)
def test_every_layout_gives_the_same_conversation(row, messages):
    assert parse_row(row, PLACE) == Sample("tulu", "tulu.jsonl:7", messages, f"{PLACE.file}:7")


@pytest.mark.parametrize(("context", "answer"), [("input", "output"), ("context", "response")])
def test_a_context_follows_the_instruction_after_a_blank_line(context, answer):
    sample = parse_row({"instruction": "Sum up.", context: "A tale.", answer: "Tale."}, PLACE)
    assert sample.messages[0].content == "Sum up.\n\nA tale."


def test_null_columns_of_other_layouts_do_not_matter():
    row = {"messages": None, "instruction": None, "text": None, "prompt": "Why?"}
    assert parse_row(row | {"response": "Because."}, PLACE).messages == DIALOGUE


def test_keys_without_a_value_do_not_matter():
    turn = ANSWERED | {"name": None, "tool_calls": [], "weight": float("nan")}
    row = {"messages": [ASKED, turn], "system": None, "tools": [], "prompt": ""}
    sample = parse_row(row, PLACE)
    assert (sample.messages, sample.tools, sample.extra_columns) == (DIALOGUE, "", "")


def test_other_keys_are_kept_and_change_nothing_that_is_read():
    turn = ANSWERED | {"name": "bot", "at": 1.5}
    row = {"messages": [ASKED, turn], "meta": {"score": float("inf")}, "": None, "text": "a"}
    sample = parse_row(row, PLACE)
    assert [(m.role, m.content) for m in sample.messages] == [(m.role, m.content) for m in DIALOGUE]
    assert json.loads(sample.messages[1].fields) == {"name": "bot", "at": 1.5}
    assert json.loads(sample.extra_columns) == {"meta": {"score": None}, "": None, "text": "a"}


def test_other_keys_are_left_out_where_the_rules_say_so():
    turn = ANSWERED | {"name": "bot", "at": 1.5, "weight": 1}
    row = {"messages": [ASKED, turn], "picture": object()}
    sample = parse_row(row, PLACE, ColumnRules(keeps_extra=False))
    assert json.loads(sample.messages[1].fields) == {"name": "bot", "weight": 1}
    assert sample.extra_columns == ""


def test_contents_in_text_parts_are_joined():
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "cause."}]
    row = {"messages": [ASKED, ANSWERED | {"content": parts}]}
    assert parse_row(row, PLACE).messages == DIALOGUE


def test_arrays_as_pandas_reads_lists_are_messages_too():
    assert TurnReader().read(np.array([ASKED, ANSWERED], dtype=object)) == DIALOGUE


def test_text_is_kept_to_the_letter():
    text = "\ufeff \0 a\r\nb\u2028 \U0001f600 e\u0301 "
    assert parse_row({"text": text}, PLACE).messages[0].content == text


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"dataset": "cot", "id": "cot_1"}, ("cot", "cot_1")),
        ({"dataset": None, "id": None}, ("tulu", "tulu.jsonl:7")),
        ({"dataset": "", "id": ""}, ("tulu", "tulu.jsonl:7")),
        ({"id": 0}, ("tulu", "0")),
        ({"id": -(10**400)}, ("tulu", f"-1{'0' * 400}")),
        ({"id": 1.0}, ("tulu", "1.0")),
        ({"id": 2.5e-3}, ("tulu", "0.0025")),
        ({"id": True, "dataset": False}, ("false", "true")),
        ({"id": np.float64(3.0), "dataset": np.int32(3)}, ("3", "3.0")),
        ({"id": datetime.date(2026, 1, 31)}, ("tulu", "2026-01-31")),
        ({"id": decimal.Decimal("1.50")}, ("tulu", "1.50")),
        ({"id": float("inf")}, ("tulu", "Infinity")),
    ],
)
def test_names_come_from_the_row_or_else_from_its_place(row, names):
    sample = parse_row({"text": "Because."} | row, PLACE)
    assert (sample.dataset, sample.sample_id) == names


@pytest.mark.parametrize(
    "name",
    [
        float("nan"),
        ["a"],
        {"$oid": "65f0"},
        b"a",
        np.array(["a"]),
        "a\0",
        "\udc00",
        "a" * (MAX_NAME_CHARACTERS + 1),
        10**5_000,
    ],
    ids=type,
)
def test_a_name_that_no_file_can_hold_costs_the_row_its_name_only(name):
    sample = parse_row({"text": "Because.", "id": name, "dataset": name}, PLACE)
    assert (sample.dataset, sample.sample_id) == ("tulu", "tulu.jsonl:7")
    is_missing = isinstance(name, float)  # NaN is no name that would be lost
    assert sample.has_unusable_name is not is_missing


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (7, "not_an_object", "a row must be a JSON object, got int 7"),
        ([], "not_an_object", "a row must be a JSON object, got list []"),
        (None, "not_an_object", "a row must be a JSON object, got NoneType None"),
        ({}, "unknown_layout", "a row must have messages, conversations, conversation or text, or"),
        ({"talk": []}, "unknown_layout", "got the keys ['talk']; dataset.columns={prompt: COLUMN"),
        ({"conversations": []}, "messages_empty", "'conversations' must not be empty"),
        ({"messages": None}, "messages_wrong_type", "'messages' must be a list, got NoneType None"),
        ({"messages": "hi"}, "messages_wrong_type", "'messages' must be a list, got str 'hi'"),
        ({"messages": {"role": []}}, "messages_wrong_type", "must be a list, got dict {'role': []"),
        ({"messages": []}, "messages_empty", "'messages' must not be empty"),
        ({"messages": [1]}, "messages_wrong_type", "messages[0] must be an object, got int 1"),
        ({"messages": [ASKED]}, "no_assistant_turn", "must have an assistant turn, got none"),
        (
            {"messages": [ASKED, ANSWERED | {"content": " \n\u00a0"}]},
            "empty_answer",
            "the assistant must say something, got only white space",
        ),
        (
            {"messages": [ASKED, {"role": "narrator", "content": "Because."}]},
            "unknown_role",
            "messages[1].role must be one of system, user, assistant, tool, got str 'narrator'",
        ),
        ({"messages": [{"content": "Hi."}]}, "unknown_role", "tool, got the keys ['content']"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "unknown_role", "got list ['user']"),
        (
            {"messages": [ANSWERED | {"content": None}]},
            "messages_wrong_type",
            "messages[0].content must be text, got NoneType None",
        ),
        (
            {"messages": [ANSWERED | {"content": [{"type": "image", "text": "a"}]}]},
            "messages_wrong_type",
            "messages[0].content must be text or a list of text parts, got dict {",
        ),
        ({"messages": [ANSWERED | {"content": []}]}, "messages_wrong_type", "got list []"),
        ({"text": 5}, "messages_wrong_type", "'text' must be text, got int 5"),
        ({"prompt": ["Why?"], "response": "x"}, "messages_wrong_type", "'prompt' must be text"),
        (
            {"instruction": "a", "input": 5, "output": "b"},
            "messages_wrong_type",
            "'input' must be text, got int 5",
        ),
        ({"instruction": "a", "output": None}, "messages_wrong_type", "'output' must be text"),
    ],
)
def test_a_row_that_breaks_the_contract_is_rejected_with_the_rule_and_the_value(
    row, reason, detail
):
    outcome = rejected(row)
    assert outcome.reason == reason
    assert detail in outcome.detail


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"text": "half an emoji \ud83d"}, "'text'"),
        ({"messages": [ASKED | {"content": "\udfff"}, ANSWERED]}, "messages[0].content"),
    ],
)
def test_a_lone_surrogate_is_rejected_in_words_that_can_be_written(row, place):
    outcome = rejected(row)
    assert outcome.reason == "lone_surrogate"
    assert outcome.detail.startswith(f"{place} must be valid Unicode, got the lone surrogate")
    "".join((outcome.dataset, outcome.sample_id, outcome.detail)).encode()  # raises on a surrogate


def test_a_surrogate_in_a_key_or_a_role_can_be_written_too():
    for row in ({"\ud800": 1}, {"messages": [{"role": "\ud800", "content": ""}]}, "\ud800"):
        rejected(row).detail.encode()


def test_a_rejected_row_keeps_its_data_set_and_its_id():
    outcome = rejected({"dataset": "cot", "id": "cot_1", "messages": []})
    assert (outcome.dataset, outcome.sample_id) == ("cot", "cot_1")


def test_a_detail_stays_short_however_long_or_deep_the_value():
    deep: list = []
    for _ in range(100_000):  # repr() of it would exceed the recursion limit
        deep = [deep]
    for value in ("x" * 10_000_000, deep, {"a": deep}, list(range(100_000))):
        assert len(rejected({"messages": [{"role": value, "content": ""}]}).detail) < 250
        assert len(rejected({f"key {n}": value for n in range(1_000)}).detail) < 800
        assert len(abridge(value)) < 100


def test_nothing_but_a_row_error_comes_out_of_any_messages():
    """Every combination of odd values; only a proper role with a proper text is accepted."""
    odd = [None, True, 0, -1.5, float("nan"), "", " ", "x", [], [[]], {}, {"a": 1}, b"x", "\ud800"]
    for role, content in itertools.product([*odd, *ROLES], odd):
        for messages in ([{"role": role, "content": content}], [ANSWERED, {"role": role}], role):
            try:
                checked = TurnReader().read(messages)
                require_answer(checked)
            except RowError:
                continue
            assert checked == (Message("assistant", "x"),)
