"""Values of files, tables and Python objects as JSON text."""

import base64
import datetime
import decimal
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

# NaN and infinity have no form in JSON: json.dumps must not write its own.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_NOTHING = ("NaTType", "NAType")  # of pandas, which need not be installed


class NoJsonError(ValueError):
    """A value has no form in JSON."""


def json_text(content: object) -> str:
    """As `raw_json`; lone surrogates are written as escapes, so that the text can be stored."""
    text = raw_json(content)
    return text if is_encodable(text) else json.dumps(json.loads(text))


def raw_json(content: object) -> str:
    """One line of JSON.

    Arrays are lists; dates and times are ISO 8601, durations seconds, decimals their digits and
    bytes base64, as text; NaN and infinity are null. Raises NoJsonError for any other type, and
    for a value that is nested too deeply.
    """
    try:
        return _ENCODER.encode(content)
    except (TypeError, ValueError, RecursionError):
        pass  # the usual values need no copy
    try:
        return _ENCODER.encode(_plain(content))
    except NoJsonError:
        raise
    except (RecursionError, ValueError):  # a number of 5,000 digits
        raise NoJsonError("a value that is nested too deeply or too long") from None


def is_encodable(text: str) -> bool:
    """False for text with lone surrogates (half of an emoji), which no file can hold."""
    if text.isascii():  # Python stores the answer with the text
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> object:  # noqa: ANN401 (a value of any kind)
    """`value` as what JSON has."""
    if hasattr(value, "tolist"):  # numpy arrays and numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return _as_text(value)


def _as_text(value: Any) -> object:  # noqa: ANN401 (a value of any kind)
    if type(value).__name__ in _NOTHING:
        return None
    match value:
        case bytes() | bytearray():
            return base64.b64encode(value).decode("ascii")
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
    raise NoJsonError(f"a {type(value).__name__}")
