"""Every layout is read whole: no text of a conversation is passed over."""

import json

import numpy as np
import pytest

from selectmoe.config.columns import ColumnRules
from selectmoe.data.layouts import without_null_keys
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.records import RejectedRow, Sample

PLACE = RowLocation("/corpora/mixed.jsonl", 1, "mixed")
QA = [("user", "Why?"), ("assistant", "Because.")]
ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def read(row: object, **names: str) -> Sample:
    sample = parse_row(row, PLACE, ColumnRules(names))
    assert isinstance(sample, Sample), sample
    return sample


def turns(row: object, **names: str) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in read(row, **names).messages]


def rejected(row: object, **names: str) -> RejectedRow:
    outcome = parse_row(row, PLACE, ColumnRules(names))
    assert isinstance(outcome, RejectedRow), outcome
    return outcome


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        },
        {"conversations": [ASKED, ANSWERED]},
        {"conversation": [ASKED, ANSWERED]},
        {"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"messages": [ASKED | {"role": "User"}, ANSWERED | {"role": "model"}]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [{"type": "text", "text": "Why?"}], "completion": [ANSWERED]},
        {"question": "Why?", "answer": "Because."},
        {"question": "Why?", "response": "Because."},
        {"input": "Why?", "output": "Because."},
        {"instruction": "Why?", "completion": "Because."},
        {"query": "Why?", "answer": "Because."},
        {"prompt": "Why?", "output": "Because."},
    ],
)
def test_the_layouts_of_public_corpora_are_read(row):
    assert turns(row) == QA
    assert read(row).extra_columns == ""


def test_all_roles_of_sharegpt_are_read():
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Rain?", "weight": None},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Kiel"}}'},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "Yes."},
    ]
    sample = read({"conversations": talk, "tools": '[{"name": "weather"}]'})
    assert [message.role for message in sample.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert json.loads(sample.messages[2].fields) == {
        "tool_calls": [{"name": "weather", "arguments": {"city": "Kiel"}}]
    }
    assert json.loads(sample.tools) == [{"name": "weather"}]


@pytest.mark.parametrize("answer", ["output", "response", "completion"])
def test_an_instruction_is_read_with_its_input_and_its_context(answer):
    row = {"instruction": "Sum up.", "input": "A tale.", "context": "Of old.", answer: "Tale."}
    assert turns(row) == [("user", "Sum up.\n\nA tale.\n\nOf old."), ("assistant", "Tale.")]


def test_a_context_of_several_passages_is_read():
    row = {"question": "Who?", "context": np.array(["One.", "Two."], dtype=object), "answer": "I."}
    assert turns(row)[0] == ("user", "Who?\n\nOne.\n\nTwo.")


@pytest.mark.parametrize("system", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [ASKED, ANSWERED]},
        {"prompt": "Why?", "response": "Because."},
        {"instruction": "Why?", "output": "Because."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
    ],
)
def test_a_system_text_beside_the_turns_is_the_first_turn(row, system):
    assert turns({**row, system: "Be brief."}) == [("system", "Be brief."), *QA]
    for nothing in (None, "", float("nan")):
        assert turns({**row, system: nothing}) == QA


def test_a_system_text_joins_the_system_turn_unless_it_is_the_same():
    row = {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]}
    assert turns(row | {"system": "Be brief."})[0] == ("system", "Be brief.")
    assert turns(row | {"system": "Be kind."})[0] == ("system", "Be kind.\n\nBe brief.")


@pytest.mark.parametrize(
    "history",
    [
        [["Hi.", "Hello."], ["How?", "Well."]],
        np.array([["Hi.", "Hello."], ["How?", "Well."]], dtype=object),
        json.dumps([["Hi.", "Hello."], ["How?", "Well."]]),
    ],
)
def test_a_history_is_the_turns_before_the_question(history):
    row = {"instruction": "Why?", "output": "Because.", "history": history, "system": "Be brief."}
    assert turns(row) == [
        ("system", "Be brief."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "How?"),
        ("assistant", "Well."),
        *QA,
    ]
    assert turns(row | {"history": []})[1:] == QA


def test_columns_have_the_names_that_the_settings_give_them():
    row = {"q": "Why?", "a": "Because.", "kind": "short", "key": 7, "text": "Not read."}
    sample = read(row, prompt="q", response="a", id="key")
    assert [(message.role, message.content) for message in sample.messages] == QA
    assert sample.sample_id == "7"
    assert json.loads(sample.extra_columns) == {"kind": "short", "text": "Not read."}


def test_a_name_for_ids_alone_leaves_the_layouts_as_they_are():
    sample = read({"uuid": "u1", "prompt": "Why?", "response": "Because."}, id="uuid")
    assert (sample.sample_id, sample.extra_columns) == ("u1", "")


def test_keys_that_a_table_gives_to_all_its_objects_are_not_read_where_they_are_null():
    arguments = {"city": "Kiel", "day": None}
    call = {"function": {"name": "weather", "arguments": arguments}, "id": None}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    tools = [{"name": "weather", "parameters": {"day": None}}]
    row = without_null_keys({"messages": [ASKED | {"tool_calls": None}, turn], "tools": tools})
    sample = read(row)
    assert json.loads(sample.messages[1].fields) == {
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Kiel"}}}]
    }
    assert json.loads(sample.tools) == [{"name": "weather", "parameters": {}}]
    plain = {"messages": [ASKED, ANSWERED], "meta": [{"a": None}]}
    assert without_null_keys(plain) is plain


def test_of_two_layouts_in_one_row_the_other_one_is_kept_as_columns():
    row = {"messages": [ASKED, ANSWERED], "prompt": "Why?", "response": None}
    assert json.loads(read(row).extra_columns) == {"prompt": "Why?"}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"history": ["Hi."]}, "history_wrong_type", "pairs of question and answer, got str 'Hi.'"),
        ({"history": [["Hi."]]}, "history_wrong_type", "got list ['Hi.'] at [0]"),
        ({"history": "Hi."}, "messages_wrong_type", "'history' must be a list, got str 'Hi.'"),
        ({"system": {"a": 1}}, "messages_wrong_type", "'system' must be text, got dict"),
        ({"input": {"a": 1}}, "messages_wrong_type", "'input' must be text, got dict"),
        ({"tools": ["weather"]}, "tools_wrong_type", "functions with a name, got str 'weather'"),
        ({"tools": [{"name": "\ud800"}]}, "lone_surrogate", "'tools' as JSON must be valid"),
        ({"input": "\ud800"}, "lone_surrogate", "'input' must be valid Unicode"),
        ({"picture": object()}, "column_unusable", "no form in JSON: a object; dataset.extra_co"),
    ],
)
def test_what_cannot_be_read_whole_is_refused(row, reason, detail):
    outcome = rejected({"instruction": "Why?", "output": "Because."} | row)
    assert outcome.reason == reason
    assert detail in outcome.detail


def test_a_row_without_the_named_columns_is_refused_with_the_names():
    outcome = rejected({"prompt": "Why?", "response": "Because."}, prompt="q", response="a")
    assert outcome.reason == "unknown_layout"
    assert outcome.detail.startswith("a row must have the columns of {prompt: q, response: a}, got")
