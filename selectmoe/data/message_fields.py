"""The keys of a message beside its role and content: reasoning, tool calls, whether it is trained.

`Message.fields` keeps them as the corpus has them; the functions here say what they mean.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from selectmoe.records import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
TRAINED_KEYS = ("weight", "train", "loss")
TOOL_KEYS = ("name", "tool_call_id")
"""Keys of a tool's answer that a chat template may read."""


def as_json(message: Message) -> dict[str, Any]:
    """The message as files and requests have it."""
    plain = {"role": message.role, "content": message.content}
    return plain | fields_of(message) if message.fields else plain


def fields_of(message: Message) -> dict[str, Any]:
    return json.loads(message.fields) if message.fields else {}


def is_answer(message: Message) -> bool:
    """True for an assistant turn that is trained on: others are context and have no score."""
    return message.role == "assistant" and is_trained(message)


def is_trained(message: Message) -> bool:
    """False where the corpus says so: weight 0, "train": false or "loss": false."""
    if not message.fields:
        return True
    fields = fields_of(message)
    return not any(_is_untrained(key, fields.get(key)) for key in TRAINED_KEYS)


def reasoning_of(message: Message) -> str:
    """What the assistant thought before it answered; empty without any."""
    if message.role != "assistant" or not message.fields:
        return ""
    fields = fields_of(message)
    texts = [fields[key].strip() for key in REASONING_KEYS if isinstance(fields.get(key), str)]
    return "\n\n".join(dict.fromkeys(text for text in texts if text))


def tool_calls_of(message: Message) -> list[dict[str, Any]]:
    """The assistant's calls in the form that chat templates read: arguments are an object."""
    if message.role != "assistant" or not message.fields:
        return []
    fields = fields_of(message)
    calls = fields.get("tool_calls") or []
    if fields.get("function_call"):
        calls = [*calls, fields["function_call"]]
    return [_call(call) for call in calls]


def tools_of(tools: str) -> list[dict[str, Any]]:
    """The functions that the assistant may call, in the form that chat templates read.

    tools: as `Sample.tools` has them.
    """
    return [tool if "function" in tool else _function(tool) for tool in json.loads(tools or "[]")]


def content_key(message: Message) -> str:
    """What of the fields is a part of the conversation, as text; empty for nothing.

    Two messages are the same where role, content and this are.
    """
    if not message.fields:
        return ""
    fields = fields_of(message)
    parts: dict[str, object] = {
        "reasoning": reasoning_of(message),
        "tool_calls": tool_calls_of(message),
        "is_untrained": not is_trained(message) and message.role == "assistant",
        "tool": [fields[key] for key in TOOL_KEYS if key in fields and message.role == "tool"],
    }
    kept = {key: part for key, part in parts.items() if part}
    return json.dumps(kept, sort_keys=True) if kept else ""


def _is_untrained(key: str, value: object) -> bool:
    """`loss` counts as true or false alone: as a number it is a measurement."""
    if isinstance(value, bool):
        return not value
    return key != "loss" and isinstance(value, int | float) and value <= 0


def is_missing(value: object) -> bool:
    """True for what tables write into cells that a row does not have."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    wrapped = dict(call) if isinstance(call.get("function"), dict) else _function(call)
    function = dict(wrapped["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # as the API of OpenAI writes them
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    function["arguments"] = arguments
    return {**wrapped, "function": function}


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": dict(function)}
