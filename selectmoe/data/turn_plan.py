"""Chat templates for turns with reasoning or tool calls: which text of them the assistant writes.

A template may write both inside the assistant's turn, with marks of its own around them. A plan is
made of one conversation with placeholders; it holds the skeleton of the text, and where in it each
assistant turn begins and ends. Reasoning that the template leaves out stands before the answer, as
`<think>`; tool calls that it leaves out are an error.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selectmoe.data.json_text import raw_json
from selectmoe.data.message_fields import (
    REASONING_KEYS,
    TOOL_KEYS,
    fields_of,
    is_answer,
    reasoning_of,
    tool_calls_of,
)
from selectmoe.data.skeleton import (
    PLACEHOLDER,
    PROBE,
    TRIMMED_PLACEHOLDER,
    Skeleton,
    Span,
    left_out,
    parse_skeleton,
    require_unchanged,
)
from selectmoe.errors import ChatTemplateError
from selectmoe.records import Message

THOUGHT = "<think>\n{}\n</think>\n\n"
TOKENIZER_REASONS = ("chat_template", "tool_calls_left_out", "no_answer_token")
"""The reasons for which a sample that the input contract accepts has no tokens to score."""
Position = tuple[int, int]
"""(number of contents that end before it, characters after the last of these)."""


class Template(Protocol):
    """Renders a conversation by a chat template; raises ChatTemplateError where it refuses."""

    def __call__(
        self, conversation: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """How one conversation is written. Slot i is the content of message i, slot len(messages) + i
    its reasoning."""

    skeleton: Skeleton
    inlined: frozenset[int]  # messages whose reasoning stands in their content
    literal: frozenset[int]  # messages whose content is a part of the skeleton
    turns: tuple[tuple[int, Position, Position], ...]  # (message, begin, end) of the assistant's

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters of each assistant turn that is trained on."""
        contents = [message.content for message in messages]
        thoughts = [reasoning_of(message) for message in messages]
        for index in self.inlined:
            contents[index] = THOUGHT.format(thoughts[index]) + contents[index]
        roles = ", ".join(message.role for message in messages)
        for slot in self.skeleton.missing(len(messages)):
            if contents[slot].strip() and slot not in self.literal:
                raise left_out(messages[slot].role, slot, roles)
        text, spans = self.skeleton.render([*contents, *thoughts])
        ends = [0, *(end for _, _, end in spans)]
        answers = [
            (ends[begin[0]] + begin[1], ends[end[0]] + end[1])
            for index, begin, end in self.turns
            if is_answer(messages[index])
        ]
        return text, sorted(answers)


def needs_plan(messages: Sequence[Message]) -> bool:
    """False where roles and contents are all that a template can write."""
    return any(
        message.fields and (reasoning_of(message) or tool_calls_of(message) or _tool_keys(message))
        for message in messages
    )


def plan_shape(messages: Sequence[Message]) -> tuple[str, ...] | None:
    """Conversations of one shape have one plan; None for one with tool calls, which has its own."""
    if any(tool_calls_of(message) or _tool_keys(message) for message in messages):
        return None
    return tuple(
        f"{message.role}{' with reasoning' if reasoning_of(message) else ''}"
        for message in messages
    )


def make_plan(template: Template, messages: Sequence[Message]) -> TurnPlan:
    """Raises ChatTemplateError for a template that refuses the conversation, changes contents or
    leaves out tool calls."""
    errors = []
    for reading in _READINGS if plan_shape(messages) is None else _READINGS[:1]:
        try:
            return _try_plan(template, _Draft(messages, reading))
        except ChatTemplateError as error:
            errors.append(error)
    raise errors[0]


def require_tool_calls(template: Template) -> None:
    """Raises ChatTemplateError for a template that writes no tool calls at all."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f0", "arguments": {}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    try:
        text = template([turns[0], {**turns[1], "tool_calls": [call]}])
    except ChatTemplateError:
        return  # what it says of the conversation itself is clearer
    if "f0" not in text:
        raise ChatTemplateError(
            "the tokenizer's chat template writes no tool calls; give the model folder a template "
            "that does",
            reason="tool_calls_left_out",
        )


def _try_plan(template: Template, draft: "_Draft") -> TurnPlan:
    draft.require_no_marks()
    skeleton = parse_skeleton(template(draft.conversation(PLACEHOLDER)))
    draft.inline({index for index in draft.thinking() if draft.slot(index) not in skeleton.order})
    if draft.inlined:
        skeleton = parse_skeleton(template(draft.conversation(PLACEHOLDER)))
    probed = template(draft.conversation(PROBE))
    require_unchanged(skeleton, draft.fill(PROBE), probed, draft.roles)
    draft.require_literals(probed)
    text, spans = skeleton.render(draft.fill(TRIMMED_PLACEHOLDER))
    turns = [
        (index, _position(begin, spans), _position(end, spans))
        for index, begin, end in _turns(template, draft, text, spans)
    ]
    return TurnPlan(skeleton, frozenset(draft.inlined), draft.literal, tuple(turns))


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a template wants to read what has no single form."""

    writes_tools_as_json: bool = False  # contents of tools are then no slots
    reads_arguments_as_text: bool = False
    reads_no_reasoning: bool = False


_READINGS = (
    _Reading(),
    _Reading(writes_tools_as_json=True),
    _Reading(reads_arguments_as_text=True),
    _Reading(writes_tools_as_json=True, reads_arguments_as_text=True),
    _Reading(writes_tools_as_json=True, reads_no_reasoning=True),
)


class _Draft:
    """A conversation in the form that templates read, with marks in place of its texts."""

    def __init__(self, messages: Sequence[Message], reading: _Reading) -> None:
        self.messages = messages
        self.calls = [tool_calls_of(message) for message in messages]
        if reading.reads_arguments_as_text:
            self.calls = [_with_text_arguments(calls) for calls in self.calls]
        literals = [m.role == "tool" and reading.writes_tools_as_json for m in messages]
        self.literal = frozenset(index for index, is_literal in enumerate(literals) if is_literal)
        self.inlined: set[int] = set()
        self.roles = ", ".join(message.role for message in messages)
        if reading.reads_no_reasoning:
            self.inline(set(self.thinking()))

    def require_no_marks(self) -> None:
        """Refuses text that cannot be told from the marks."""
        tools = [(message.fields, message.content) for message in self.messages]
        written = json.dumps([self.calls, tools if self.literal else []], ensure_ascii=False)
        if "\ue000" in written or "\ue001" in written:
            raise ChatTemplateError("a tool call must not hold the characters U+E000 and U+E001")

    def require_literals(self, text: str) -> None:
        """Raises ChatTemplateError unless the text has the contents that are no slots."""
        for index in self.literal:
            if not _is_written(self.messages[index].content.strip(), text):
                raise left_out("tool", index, self.roles)

    def thinking(self) -> Iterator[int]:
        """Messages with reasoning that does not stand in their content."""
        for index, message in enumerate(self.messages):
            if index not in self.inlined and reasoning_of(message):
                yield index

    def inline(self, indices: set[int]) -> None:
        self.inlined |= indices

    def slot(self, index: int) -> int:
        """The slot of a message's reasoning."""
        return len(self.messages) + index

    def has_content(self, index: int) -> bool:
        """False for a turn that is a tool call alone: templates write no empty content then."""
        is_call = bool(self.calls[index]) and index not in self.inlined
        return not is_call or bool(self.messages[index].content.strip())

    def fill(self, mark: str) -> list[str]:
        """A mark for each slot. Reasoning is trimmed, since every template trims it."""
        slots = range(2 * len(self.messages))
        return [
            mark.format(slot) if slot < len(self.messages) else mark.format(slot).strip()
            for slot in slots
        ]

    def conversation(self, mark: str, *, plain: int | None = None) -> list[dict[str, Any]]:
        """plain: this message is written as a plain answer, without reasoning and tool calls."""
        marks = self.fill(mark)
        thinking = set(self.thinking()) - {plain}
        entries: list[dict[str, Any]] = []
        for index, message in enumerate(self.messages):
            has_content = index == plain or self.has_content(index)
            entry: dict[str, Any] = {"role": message.role}
            entry["content"] = marks[index] if has_content else ""
            if index in self.literal:
                entry["content"] = message.content
            if index in thinking:
                entry |= dict.fromkeys(REASONING_KEYS, marks[self.slot(index)])
            if self.calls[index] and index != plain:
                entry["tool_calls"] = self.calls[index]
            entries.append(entry | _tool_keys(message))
        return entries


def _turns(
    template: Template, draft: _Draft, text: str, spans: Sequence[Span]
) -> Iterator[tuple[int, int, int]]:
    """(message, begin, end) of each text that the assistant writes, by the marks in `text`."""
    thinking = set(draft.thinking())
    for index, message in enumerate(draft.messages):
        if message.role != "assistant":
            continue
        own = [(start, end) for slot, start, end in spans if slot in (index, draft.slot(index))]
        if draft.calls[index]:
            begin, end = _call_span(template, draft, index, text)
            # Some templates write a tool's answer within the turn that calls it.
            foreign = {draft.slot(index), index}
            end = min([end, *(s for slot, s, _ in spans if s >= begin and slot not in foreign)])
            _require_calls(draft.calls[index], text[begin:end], index)
            yield index, _begin(template, draft, index, text, begin), end
            yield from ((index, start, stop) for start, stop in own if start >= end)
        elif index in thinking and own:
            begin = min(start for start, _ in own)
            yield index, _begin(template, draft, index, text, begin), max(end for _, end in own)
        else:
            yield from ((index, start, end) for start, end in own)


def _begin(template: Template, draft: _Draft, index: int, text: str, latest: int) -> int:
    """Where the assistant begins to write, after the template's generation prompt; `latest` where
    the template has none, or writes the turns before otherwise."""
    before = draft.conversation(TRIMMED_PLACEHOLDER)[:index]
    try:
        prompt = template(before, add_generation_prompt=True) if before else ""
        has_prompt = bool(prompt) and prompt != template(before)
    except ChatTemplateError:
        return latest
    return len(prompt) if has_prompt and text.startswith(prompt, 0, latest) else latest


def _call_span(template: Template, draft: _Draft, index: int, text: str) -> tuple[int, int]:
    """Where a turn with tool calls differs from one with a plain answer in its place."""
    answered = draft.conversation(TRIMMED_PLACEHOLDER, plain=index)
    mark = draft.fill(TRIMMED_PLACEHOLDER)[index]
    try:
        other, whole = template(answered), text
    except ChatTemplateError:  # it wants a tool's answer after a call alone
        other = template(answered[: index + 1])
        whole = template(draft.conversation(TRIMMED_PLACEHOLDER)[: index + 1])
    start = other.find(mark)
    if start < 0:
        raise left_out("assistant", index, draft.roles)
    begin = min(_num_equal(whole, other), start)
    closing = other[start + len(mark) :][::-1]
    end = len(whole) - _num_equal(whole[::-1], closing)
    if not text.startswith(whole[:end]):
        raise ChatTemplateError(
            "the tool calls cannot be found in the text of the tokenizer's chat template, at "
            f"messages[{index}] of the roles {draft.roles}",
            reason="tool_calls_left_out",
        )
    return begin, end


def _num_equal(first: str, second: str) -> int:
    """The number of characters with which both begin."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in pairs)


def _require_calls(calls: Sequence[dict[str, Any]], text: str, index: int) -> None:
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        for word in (function["name"], *_texts(arguments)):
            if not _is_written(word, text):
                raise ChatTemplateError(
                    "the tokenizer's chat template leaves out the tool calls at "
                    f"messages[{index}]; give the model folder a template that writes them",
                    reason="tool_calls_left_out",
                )


def _is_written(word: str, text: str) -> bool:
    """Whether a text has these characters, as they are or as JSON writes them."""
    forms = (word, *(json.dumps(word, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)))
    return any(form in text for form in forms)


def _with_text_arguments(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with their arguments as the text of a JSON object."""
    texts = [raw_json(call["function"]["arguments"]) for call in calls]
    return [
        {**call, "function": {**call["function"], "arguments": text}}
        for call, text in zip(calls, texts, strict=True)
    ]


def _texts(value: object) -> Iterator[str]:
    """All texts within a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from (key, *_texts(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _tool_keys(message: Message) -> dict[str, Any]:
    if message.role != "tool" or not message.fields:
        return {}
    fields = fields_of(message)
    return {key: fields[key] for key in TOOL_KEYS if key in fields}


def _position(character: int, spans: Sequence[Span]) -> Position:
    ends = [end for _, _, end in spans if end <= character]
    return len(ends), character - (ends[-1] if ends else 0)
