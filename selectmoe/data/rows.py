"""One row of a corpus as a Sample, or the reason why not: the input contract, in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selectmoe.records import Message, RejectedRow, Sample

ROLES = ("system", "user", "assistant")
_SHOWN_CHARACTERS = 80


class RowError(Exception):
    """Why a row cannot be a sample; becomes a RejectedRow in `parse_row`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where a row stands, and the data set it belongs to unless it says otherwise."""

    file: str
    row: int  # from 1
    dataset: str

    def reject(self, reason: str, detail: str, *, sample_id: str = "") -> RejectedRow:
        return RejectedRow(self.file, self.row, self.dataset, sample_id, reason, detail)


def parse_row(row: object, place: RowPlace) -> Sample | RejectedRow:
    """A row in any known layout as a Sample.

    Layouts: {"messages": [{"role", "content"}, …]}, {"instruction", "input", "output"} (Alpaca),
    {"prompt", "response"} and {"text"}, which becomes one assistant turn. "dataset" and "id" are
    taken from the row where it has them.
    """
    if not isinstance(row, Mapping):
        return place.reject("not_an_object", f"a row must be a JSON object, got {shown(row)}")
    sample_id, dataset = f"{place.file.rpartition('/')[2]}:{place.row}", place.dataset
    try:
        sample_id = _name(row, "id") or sample_id
        dataset = _name(row, "dataset") or dataset
        messages = checked_messages(_find_layout(row)(row))
        for text in (sample_id, dataset, *(message.content for message in messages)):
            _require_encodable(text)
    except RowError as error:
        # A lone surrogate cannot be written to any file, so it cannot be in the reject either.
        sample_id, detail = (
            text.encode("utf-8", "backslashreplace").decode() for text in (sample_id, str(error))
        )
        return place.reject(error.reason, detail, sample_id=sample_id)
    return Sample(dataset, sample_id, messages, f"{place.file}:{place.row}")


def checked_messages(messages: object) -> tuple[Message, ...]:
    """Raises RowError unless `messages` is a conversation with something said by an assistant."""
    if hasattr(messages, "tolist"):  # parquet gives numpy arrays for lists
        messages = messages.tolist()
    if not isinstance(messages, list | tuple):
        raise RowError("messages_wrong_type", f"'messages' must be a list, got {shown(messages)}")
    if not messages:
        raise RowError("messages_empty", "'messages' must not be empty")
    checked = tuple(_message(entry, index) for index, entry in enumerate(messages))
    answers = [message.content for message in checked if message.role == "assistant"]
    if not answers:
        raise RowError("no_assistant_turn", "'messages' must have an assistant turn, got none")
    if not any(answer.strip() for answer in answers):
        raise RowError("empty_answer", "the assistant must say something, got only white space")
    return checked


def shown(content: object) -> str:
    """A value for a message: its type and its beginning."""
    text = repr(content)
    ending = "…" if len(text) > _SHOWN_CHARACTERS else ""
    return f"{type(content).__name__} {text[:_SHOWN_CHARACTERS]}{ending}"


def _message(entry: object, index: int) -> Message:
    if not isinstance(entry, Mapping):
        raise RowError(
            "messages_wrong_type", f"messages[{index}] must be an object, got {shown(entry)}"
        )
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise RowError(
            "unknown_role",
            f"messages[{index}].role must be one of {', '.join(ROLES)}, got {role!r}",
        )
    if not isinstance(content, str):
        raise RowError(
            "messages_wrong_type", f"messages[{index}].content must be text, got {shown(content)}"
        )
    return Message(role, content)


def _name(row: Mapping[str, Any], key: str) -> str:
    name = row.get(key)
    if name is None:
        return ""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise RowError(
            f"{key}_wrong_type", f"{key!r} must be text or a whole number, got {shown(name)}"
        )
    return str(name)


def _find_layout(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], object]:
    for keys, layout in _LAYOUTS.items():
        if all(row.get(key) is not None for key in keys):
            return layout
    known = "; ".join(", ".join(keys) for keys in _LAYOUTS)
    raise RowError(
        "unknown_layout", f"a row must have one of ({known}), got the keys {sorted(row)}"
    )


def _from_alpaca(row: Mapping[str, Any]) -> object:
    extra = row.get("input") or ""
    question = f"{_text(row, 'instruction')}\n\n{extra}" if extra else _text(row, "instruction")
    return _dialogue(question, _text(row, "output"))


def _from_prompt(row: Mapping[str, Any]) -> object:
    return _dialogue(_text(row, "prompt"), _text(row, "response"))


def _from_text(row: Mapping[str, Any]) -> object:
    return [{"role": "assistant", "content": _text(row, "text")}]


def _dialogue(question: str, answer: str) -> object:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise RowError("messages_wrong_type", f"{key!r} must be text, got {shown(text)}")
    return text


def _require_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "lone_surrogate",
            f"text must be valid Unicode, got the lone surrogate {text[error.start]!r} at "
            f"character {error.start}",
        ) from error


_LAYOUTS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], object]] = {
    ("messages",): lambda row: row["messages"],
    ("instruction", "output"): _from_alpaca,
    ("prompt", "response"): _from_prompt,
    ("text",): _from_text,
}
