"""The input contract: parses a row of a corpus into a Sample, or rejects it with a reason."""

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selectmoe.records import Message, RejectedRow, Sample

ROLES = ("system", "user", "assistant")
# Names are kept in numpy arrays, which are as wide as the longest and drop a NUL at its end.
MAX_NAME_CHARACTERS = 4_096
_SHOWN_CHARACTERS = 80


class RowError(Exception):
    """A row cannot be a sample; `parse_row` turns it into a RejectedRow."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RowLocation:
    """Where a row was read, and the dataset it belongs to unless it names one itself."""

    file: str
    row: int  # from 1
    dataset: str
    name: str = ""  # the file as ids have it; empty: its own name

    @property
    def default_id(self) -> str:
        """The id of a row that has none."""
        return f"{self.name or self.file.rpartition('/')[2]}:{self.row}"

    def reject(self, reason: str, detail: str, *, sample_id: str = "") -> RejectedRow:
        return RejectedRow(self.file, self.row, self.dataset, sample_id, reason, detail)


def parse_row(row: object, location: RowLocation) -> Sample | RejectedRow:
    """A row in any known layout as a Sample.

    Layouts: {"messages": [{"role", "content"}, …]}, {"instruction", "input", "output"} (Alpaca),
    {"instruction", "context", "response"} (Dolly), {"prompt", "response"} and {"text"}, which
    becomes one assistant turn. "dataset" and "id" are taken from the row where it has them; other
    keys do not matter. A content may also be a list of {"type": "text", "text"}, as chat APIs write
    it.
    """
    if not isinstance(row, Mapping):
        return location.reject("not_an_object", f"a row must be a JSON object, got {abridge(row)}")
    dataset = _name(row, "dataset") or location.dataset
    sample_id = _name(row, "id") or location.default_id
    try:
        messages = check_messages(_find_layout(row)(row))
    except RowError as error:
        return RejectedRow(
            location.file, location.row, dataset, sample_id, error.reason, str(error)
        )
    return Sample(dataset, sample_id, messages, f"{location.file}:{location.row}")


def check_messages(messages: object) -> tuple[Message, ...]:
    """The messages of a conversation. Raises RowError unless an assistant says something in it."""
    if hasattr(messages, "tolist"):  # pandas gives numpy arrays for lists
        messages = messages.tolist()
    if not isinstance(messages, list | tuple):
        raise RowError("messages_wrong_type", f"'messages' must be a list, got {abridge(messages)}")
    if not messages:
        raise RowError("messages_empty", "'messages' must not be empty")
    checked = tuple(_message(entry, index) for index, entry in enumerate(messages))
    answers = [message.content for message in checked if message.role == "assistant"]
    if not answers:
        raise RowError("no_assistant_turn", "'messages' must have an assistant turn, got none")
    if not any(answer.strip() for answer in answers):
        raise RowError("empty_answer", "the assistant must say something, got only white space")
    return checked


def is_encodable(text: str) -> bool:
    """False for text with a lone surrogate (half of an emoji, as a JSON escape)."""
    if text.isascii():  # Python stores the answer with the text
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def abridge(content: object) -> str:
    """A value for an error message: its type and its first 80 characters."""
    text = _ABRIDGED.repr(content)
    ending = "…" if len(text) > _SHOWN_CHARACTERS else ""
    return f"{type(content).__name__} {text[:_SHOWN_CHARACTERS]}{ending}"


def _message(entry: object, index: int) -> Message:
    if not isinstance(entry, Mapping):
        raise RowError(
            "messages_wrong_type",
            f"messages[{index}] must be an object, got {abridge(entry)}",
        )
    role, content = entry.get("role"), _join_parts(entry.get("content"))
    if role not in ROLES:
        raise RowError(
            "unknown_role",
            f"messages[{index}].role must be one of {', '.join(ROLES)}, got {abridge(role)}",
        )
    if not isinstance(content, str):
        raise RowError(
            "messages_wrong_type",
            f"messages[{index}].content must be text, got {abridge(content)}",
        )
    _require_encodable(content, f"messages[{index}].content")
    return Message(role, content)


def _join_parts(content: object) -> object:
    """The text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def _name(row: Mapping[str, Any], key: str) -> str:
    """A name as text: 7 is "7", 1.0 is "1.0", true is "true". Empty where there is none, or one
    that no file can hold or that is a list or an object: it costs the row its name only."""
    value: Any = row.get(key)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if value is None or value != value or isinstance(value, list | tuple | Mapping | bytes):
        return ""  # NaN is what pandas writes for no value
    name = value if isinstance(value, str) else _scalar_text(value)
    if len(name) > MAX_NAME_CHARACTERS or "\0" in name:
        return ""
    return name if is_encodable(name) else ""


def _scalar_text(value: object) -> str:
    """As JSON has it; what JSON does not have (a date, a decimal) as Python writes it."""
    try:
        return json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    except ValueError:  # a number of 5,000 digits
        return ""


def _find_layout(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], object]:
    # A table of several layouts has the columns of all in every row, null in the unused ones. Only
    # if no layout has values does one count whose keys exist: its error message is the clearest.
    for is_there in (lambda key: row.get(key) is not None, lambda key: key in row):
        for keys, layout in _LAYOUTS.items():
            if all(map(is_there, keys)):
                return layout
    known = "; ".join(", ".join(keys) for keys in _LAYOUTS)
    raise RowError(
        "unknown_layout",
        f"a row must have one of ({known}), got the keys {_ABRIDGED.repr(list(row))}",
    )


def _dialogue(
    row: Mapping[str, Any], answer: str, *, question: str = "instruction", context: str = ""
) -> object:
    """One question and its answer, from the columns of these names; the context may be absent."""
    asked = _text(row, question)
    added = _text(row, context) if context and row.get(context) is not None else ""
    return [
        {"role": "user", "content": f"{asked}\n\n{added}" if added else asked},
        {"role": "assistant", "content": _text(row, answer)},
    ]


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise RowError("messages_wrong_type", f"{key!r} must be text, got {abridge(text)}")
    return text


def _require_encodable(text: str, name: str) -> None:
    """Refuses lone surrogates (half of an emoji, as a JSON escape): no file can hold them."""
    if text.isascii():  # Python stores the answer with the text
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "lone_surrogate",
            f"{name} must be valid Unicode, got the lone surrogate {text[error.start]!r} at "
            f"character {error.start}",
        ) from error


_LAYOUTS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], object]] = {
    ("messages",): lambda row: row["messages"],
    ("instruction", "output"): lambda row: _dialogue(row, "output", context="input"),
    ("instruction", "response"): lambda row: _dialogue(row, "response", context="context"),
    ("prompt", "response"): lambda row: _dialogue(row, "response", question="prompt"),
    ("text",): lambda row: [{"role": "assistant", "content": _text(row, "text")}],
}
ROW_KEYS = frozenset(
    {"dataset", "id", "input", "context", *(key for keys in _LAYOUTS for key in keys)}
)

# Limits length and depth: repr() itself fails on a value that is nested too deeply.
_ABRIDGED = reprlib.Repr()
_ABRIDGED.maxlevel = 4
_ABRIDGED.maxstring = _ABRIDGED.maxother = _SHOWN_CHARACTERS
_ABRIDGED.maxlist = _ABRIDGED.maxdict = 20
