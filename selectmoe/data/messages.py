"""Turns of a conversation, in every form that corpora and chat APIs write them, as messages."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectmoe.data.json_text import NoJsonError, json_text, raw_json
from selectmoe.data.message_fields import (
    CALL_KEYS,
    REASONING_KEYS,
    TOOL_KEYS,
    TRAINED_KEYS,
    is_missing,
    is_trained,
    reasoning_of,
    tool_calls_of,
)
from selectmoe.data.row_errors import RowError, abridge, abridge_keys, require_encodable
from selectmoe.records import Message

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
"""Names of roles in chat APIs and in the layout of ShareGPT, in any case."""
CALL_ROLES = ("function_call", "tool_call")  # of an assistant turn whose text is a tool call
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
READ_KEYS = frozenset((*REASONING_KEYS, *CALL_KEYS, *TRAINED_KEYS, *TOOL_KEYS))

# A letter that a reader sees. Left out are white space, control characters, and what has no
# width: soft hyphens, joiners, direction marks, variation selectors, Hangul and Braille blanks.
_VISIBLE = re.compile(
    "[^\\s\\x00-\\x1f\\x7f-\\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True, slots=True)
class TurnReader:
    """Reads the turns below one key of a row."""

    key: str = "messages"  # for error messages
    keeps_extra: bool = True  # whether messages keep keys that nothing reads

    def read(self, turns: object) -> tuple[Message, ...]:
        """Raises RowError for anything but a list of turns; it may be empty."""
        turns = as_list(turns, self.key)
        return tuple([self._message(entry, index) for index, entry in enumerate(turns)])

    def _message(self, entry: object, index: int) -> Message:
        if type(entry) is not dict and not isinstance(entry, Mapping):
            raise RowError(
                "messages_wrong_type",
                f"{self.key}[{index}] must be an object, got {abridge(entry)}",
            )
        role, content = entry.get("role"), entry.get("content")
        if len(entry) == 2 and isinstance(content, str) and role in ROLES:
            if not content.isascii():
                require_encodable(content, f"{self.key}[{index}].content")
            return Message(role, content)
        return self._any_message(entry, f"{self.key}[{index}]")

    def _any_message(self, entry: Mapping[Any, Any], name: str) -> Message:
        """A turn with other names of keys and roles, with parts, or with more keys."""
        role_key = "from" if is_missing(entry.get("role")) and "from" in entry else "role"
        has_value = is_missing(entry.get("content")) and "value" in entry
        text_key = "value" if has_value else "content"
        fields = {
            key: value
            for key, value in entry.items()
            if key not in (role_key, text_key) and not is_missing(value)
        }
        role = entry.get(role_key)
        content, thoughts = join_parts(entry.get(text_key), f"{name}.{text_key}")
        if thoughts:
            fields.setdefault("reasoning_content", thoughts)
        if isinstance(role, str) and role.lower() in CALL_ROLES:
            calls = from_json(content)
            calls = calls if isinstance(calls, list) else [calls]
            role, content, fields = "assistant", "", fields | {"tool_calls": calls}
        role = _role(role, f"{name}.{role_key}", entry)
        if role == "assistant":
            _check_trained(fields, name)
            fields = _checked_calls(_checked_reasoning(fields, name), name)
            has_more = any(fields.get(key) for key in (*CALL_KEYS, *REASONING_KEYS))
            content = "" if is_missing(content) and has_more else content
        if not isinstance(content, str):
            raise RowError(
                "messages_wrong_type", f"{name}.{text_key} must be text, got {abridge(content)}"
            )
        require_encodable(content, f"{name}.{text_key}")
        return Message(role, content, self._fields_text(fields, name))

    def _fields_text(self, fields: Mapping[Any, Any], name: str) -> str:
        if not self.keeps_extra:
            fields = {key: value for key, value in fields.items() if key in READ_KEYS}
        if not fields:
            return ""
        try:
            read = raw_json({key: value for key, value in fields.items() if key in READ_KEYS})
            require_encodable(read, f"{name} as JSON")
            return json_text(fields)
        except NoJsonError as error:
            raise RowError("column_unusable", f"{name} has no form in JSON: {error}") from None


def require_answer(messages: Sequence[Message]) -> None:
    """Raises RowError unless an assistant says something in a turn that is trained on."""
    for message in messages:  # as in most rows
        if message.role == "assistant" and not message.fields and is_visible(message.content):
            return
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError("no_assistant_turn", "a row must have an assistant turn, got none")
    trained = [message for message in answers if is_trained(message)]
    if not trained:
        raise RowError(
            "no_trained_turn",
            "an assistant turn must be trained on, got weight 0 or train false in all of them",
        )
    if not any(map(_says_something, trained)):
        raise RowError(
            "empty_answer",
            "the assistant must say something, got only white space or invisible characters",
        )


def _says_something(answer: Message) -> bool:
    return is_visible(answer.content) or bool(reasoning_of(answer)) or bool(tool_calls_of(answer))


def is_visible(text: str) -> bool:
    """False for text of white space, control and zero-width characters alone."""
    return _VISIBLE.search(text) is not None


def join_parts(content: object, name: str) -> tuple[object, str]:
    """(text, reasoning) of a content that is a list of parts; any other content as it is.

    Parts are joined without anything between them, as chat templates write them.
    """
    if hasattr(content, "tolist"):
        content = content.tolist()
    if not isinstance(content, list | tuple) or not content:
        return content, ""
    texts, thoughts = [], []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in THOUGHT_PARTS and isinstance(part.get(kind, part.get("text")), str):
            thoughts.append(part.get(kind, part.get("text")))
        else:
            raise RowError(
                "messages_wrong_type",
                f"{name} must be text or a list of text parts, got {abridge(part)} at [{index}]",
            )
    return "".join(texts), "\n\n".join(thoughts)


def as_list(turns: object, key: str) -> Sequence[Any]:
    """A list, an array, or a list that is written as JSON, as tables of text have it."""
    if hasattr(turns, "tolist"):  # pandas gives numpy arrays for lists
        turns = turns.tolist()
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = from_json(turns)
    if not isinstance(turns, list | tuple):
        raise RowError("messages_wrong_type", f"{key!r} must be a list, got {abridge(turns)}")
    return turns


def _role(role: object, name: str, entry: Mapping[Any, Any]) -> str:
    known = ROLE_NAMES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        got = abridge(role) if not is_missing(role) else f"the keys {abridge_keys(entry)}"
        raise RowError("unknown_role", f"{name} must be one of {', '.join(ROLES)}, got {got}")
    return known


def _check_trained(fields: Mapping[Any, Any], name: str) -> None:
    """Text such as "false", as tables of text have it, would count as true."""
    for key in ("weight", "train"):
        value = fields.get(key)
        if value is not None and not isinstance(value, bool | int | float):
            raise RowError(
                "messages_wrong_type",
                f"{name}.{key} must be a number, true or false, got {abridge(value)}",
            )


def _checked_reasoning(fields: dict[Any, Any], name: str) -> dict[Any, Any]:
    """The fields, with reasoning that is written in parts as text."""
    for key in REASONING_KEYS:
        if fields.get(key) and not isinstance(fields[key], str | bool | int | float):
            text, _ = join_parts(fields[key], f"{name}.{key}")
            if not isinstance(text, str):
                raise RowError(
                    "messages_wrong_type", f"{name}.{key} must be text, got {abridge(text)}"
                )
            fields = fields | {key: text}
    return fields


def _checked_calls(fields: dict[Any, Any], name: str) -> dict[Any, Any]:
    """The fields, with tool calls as lists of objects that name a function; none without any."""
    for key in CALL_KEYS:
        if not fields.get(key):
            fields = {other: value for other, value in fields.items() if other != key}
            continue
        calls = fields[key]
        if key == "tool_calls":
            calls = [from_json(call) for call in as_list(calls, f"{name}.{key}")]
            fields = fields | {key: calls}
        for call in calls if key == "tool_calls" else [calls]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise RowError(
                    "tool_calls_wrong_type",
                    f"{name}.{key} must name a function in each call, got {abridge(call)}",
                )
    return fields


def from_json(value: object) -> object:
    """A tool or a call that is written as JSON, as in the turns of ShareGPT."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
