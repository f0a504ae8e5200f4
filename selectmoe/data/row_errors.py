"""Why a row cannot be a sample, in words that name the rule and the value."""

import reprlib
from collections.abc import Iterable

from selectmoe.data.json_text import is_encodable

_SHOWN_CHARACTERS = 80
# Limits length and depth: repr() itself fails on a value that is nested too deeply.
_ABRIDGED = reprlib.Repr()
_ABRIDGED.maxlevel = 4
_ABRIDGED.maxstring = _ABRIDGED.maxother = _SHOWN_CHARACTERS
_ABRIDGED.maxlist = _ABRIDGED.maxdict = 20


class RowError(Exception):
    """A row cannot be a sample; `parse_row` turns it into a RejectedRow."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def abridge(content: object) -> str:
    """A value for an error message: its type and its first 80 characters."""
    text = _ABRIDGED.repr(content)
    ending = "…" if len(text) > _SHOWN_CHARACTERS else ""
    return f"{type(content).__name__} {text[:_SHOWN_CHARACTERS]}{ending}"


def abridge_keys(keys: Iterable[object]) -> str:
    """The keys of a row or of a message for an error message: at most twenty."""
    return _ABRIDGED.repr(list(keys))


def require_encodable(text: str, name: str) -> None:
    """Refuses lone surrogates (half of an emoji, as a JSON escape): no file can hold them."""
    if is_encodable(text):
        return
    start = next(at for at, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
    raise RowError(
        "lone_surrogate",
        f"{name} must be valid Unicode, got the lone surrogate {text[start]!r} at "
        f"character {start}",
    )
