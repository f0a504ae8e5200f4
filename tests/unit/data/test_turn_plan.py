"""Reasoning, tool calls and turns that are not trained on, as chat templates write them."""

import json

import pytest
from transformers import AutoTokenizer

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.errors import ChatTemplateError
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Sample

HEAD = "{% for t in tools or [] %}<fn>{{ t.function.name }}</fn>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
KNOWS_ALL = (
    HEAD + "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<end>{% endfor %}" + PROMPT
)
# Only the last turn's reasoning; a tool's answer in JSON; arguments joined as text.
PECULIAR = (
    "{% for m in messages %}{% if m.role == 'tool' %}<tool>{{ m.content | tojson }}<end>"
    "{% else %}<{{ m.role }}>{% if loop.last and m.thinking %}({{ m.thinking }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '[' + c.function.name + ': ' + c.function.arguments + ']' }}{% endfor %}<end>"
    "{% endif %}{% endfor %}" + PROMPT
)
# Refuses a tool's answer without a call before it.
STRICT = (
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<end>{% endfor %}"
)
CALL = {"name": "weather", "arguments": '{"city": "\\"Kiel\\""}'}
TOOLS = [{"name": "weather", "parameters": {}}]
QUESTION = {"role": "user", "content": "Rain?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": '{"wet": 1}', "name": "weather"}
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def chat():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)

    def with_template(template: str | None) -> ChatTokenizer:
        if template is not None:
            tokenizer.chat_template = template
        return ChatTokenizer(tokenizer, max_sequence_length=512)

    return with_template


def sample_of(*messages: dict, **columns: object) -> Sample:
    row = parse_row({"messages": list(messages), **columns}, RowLocation("a.jsonl", 1, "a"))
    assert isinstance(row, Sample), row
    return row


def answers(chat: ChatTokenizer, sample: Sample) -> list[str]:
    text, spans = chat.render(sample.messages, sample.tools)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_stands_before_the_answer_where_the_template_leaves_it_out(chat, key):
    plain = chat(None)
    thought = ANSWER | {key: "Clouds."}
    assert answers(plain, sample_of(QUESTION, thought)) == ["<think>\nClouds.\n</think>\n\nYes."]
    [tokens] = plain.tokenize([sample_of(QUESTION, thought)])
    [without] = plain.tokenize([sample_of(QUESTION, ANSWER)])
    assert tokens.answer_mask.sum() > without.answer_mask.sum()


def test_reasoning_is_written_by_a_template_that_knows_it(chat):
    knows = chat(KNOWS_ALL)
    first, second = ANSWER | {"thinking": "One."}, ANSWER | {"reasoning": "Two."}
    sample = sample_of(QUESTION, first, QUESTION, second)
    assert answers(knows, sample) == ["<think>One.</think>Yes.", "<think>Two.</think>Yes."]
    assert answers(chat(PECULIAR), sample) == ["<think>\nOne.\n</think>\n\nYes.", "(Two.)Yes."]
    # The same shape with other texts uses the same plan.
    other = sample_of(QUESTION, first, QUESTION, second | {"content": " No. ", "reasoning": "3"})
    assert answers(knows, other) == ["<think>One.</think>Yes.", "<think>3</think>No."]


def test_a_tool_call_is_the_assistants_text_and_the_tools_answer_is_not(chat):
    sample = sample_of(QUESTION, CALLING, TOOL, ANSWER, tools=TOOLS)
    arguments = '{"city": "\\"Kiel\\""}'
    knows = chat(KNOWS_ALL)
    assert answers(knows, sample) == [f"<call>weather {arguments}</call>", "Yes."]
    assert "<fn>weather</fn>" in knows.render(sample.messages, sample.tools)[0]
    spoken = sample_of(QUESTION, CALLING | {"content": "Wait."}, TOOL, ANSWER)
    assert answers(knows, spoken)[0] == f"Wait.<call>weather {arguments}</call>"


def test_templates_that_want_another_form_of_tool_calls_get_it(chat):
    sample = sample_of(QUESTION, CALLING, TOOL, ANSWER)
    peculiar = chat(PECULIAR)
    assert answers(peculiar, sample) == ['[weather: {"city": "\\"Kiel\\""}]', "Yes."]
    assert json.dumps(TOOL["content"]) in peculiar.render(sample.messages)[0]
    assert answers(chat(STRICT), sample) == [
        '{"name": "weather", "arguments": {"city": "\\"Kiel\\""}}',
        "Yes.",
    ]


def test_tool_calls_that_the_template_leaves_out_are_a_reason_to_refuse_the_row(chat):
    plain = chat(None)
    kept, refused = plain.tokenize_each(
        [sample_of(QUESTION, ANSWER), sample_of(QUESTION, CALLING, TOOL, ANSWER)]
    )
    assert kept.answer_mask.any()
    assert refused.reason == "tool_calls_left_out"
    assert "writes no tool calls" in refused.detail


def test_tools_stand_in_the_system_turn_where_the_template_takes_none(chat):
    plain = chat(None)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        sample = sample_of(*system, QUESTION, ANSWER, tools=TOOLS)
        text, spans = plain.render(sample.messages, sample.tools)
        expected = "\n\n".join([*(turn["content"] for turn in system), json.dumps(TOOLS)])
        turns = (*sample_of({"role": "system", "content": expected}, QUESTION, ANSWER).messages,)
        assert (text, spans) == plain.render(turns)


@pytest.mark.parametrize("template", [None, KNOWS_ALL])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_trained_on_is_context(chat, template, mark):
    chosen = chat(template)
    turns = [QUESTION, ANSWER | {"content": "Dunno."}, QUESTION, ANSWER]
    untrained = [QUESTION, turns[1] | mark, QUESTION, ANSWER]
    whole, part = sample_of(*turns), sample_of(*untrained)
    assert chosen.render(whole.messages)[0] == chosen.render(part.messages)[0]
    assert answers(chosen, whole) == ["Dunno.", "Yes."]
    assert answers(chosen, part) == ["Yes."]
    thinking = sample_of(QUESTION, turns[1] | mark | {"thinking": "Hm."}, QUESTION, ANSWER)
    assert answers(chosen, thinking) == ["Yes."]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_template_that_leaves_out_a_turn_is_refused(chat, role):
    template = "{% for m in messages %}{% if m.role != '" + role + "' %}{{ m.content }}{% endif %}"
    chosen = chat(template + "{% endfor %}")
    sample = sample_of({"role": role, "content": "Hear me."}, ANSWER)
    with pytest.raises(ChatTemplateError, match=f"leaves out the {role} turn at messages"):
        chosen.render(sample.messages)
    silent = sample_of({"role": role, "content": " "}, ANSWER)
    assert answers(chosen, silent) == ["Yes."]
