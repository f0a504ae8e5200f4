"""Parses the body of POST /score into samples; a refusal names the invalid field."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError

from selectmoe.client.wire import Batching, Detail
from selectmoe.data.rows import ROLES, RowLocation, parse_row
from selectmoe.records import RejectedRow, Sample
from serve.error_responses import RequestError
from serve.schemas import MessagesSample, PromptSample, TextSample, WireModel

PAIR_FIELDS = ("text_1", "text_2", "query", "documents")
PAIR_HINT = (
    "this endpoint scores single samples, each an instruction with its answer; it does not compare "
    'pairs of texts: send {"samples": [{"prompt": "…", "response": "…"}]}'
)
MAX_FIELD_CHARACTERS = 60  # of an unknown field's name, in a message


@dataclass(frozen=True, slots=True)
class ParsedSample:
    """One sample of a request, or why it is invalid."""

    wire_id: str | None  # the client's identifier
    sample: Sample | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    samples: tuple[ParsedSample, ...]
    detail: Detail
    batching: Batching
    is_list: bool


def parse_request(body: bytes, *, max_samples: int) -> ParsedRequest:
    """Raises RequestError if the request as a whole is invalid.

    An invalid sample of a list carries its own error. If no sample of the list is well-formed, the
    fault is in the calling program and not in the corpus, so the whole request is refused.
    """
    content = _json(body)
    if not isinstance(content, dict):
        raise _invalid(f"the body must be a JSON object with 'samples', got {_type_of(content)}")
    _refuse_unknown_fields(content, ("samples", "detail", "batching"), prefix="")
    detail = _choice(content, "detail", get_args(Detail))
    batching = _choice(content, "batching", get_args(Batching))
    samples = content.get("samples")
    if isinstance(samples, dict):
        return ParsedRequest((_parse_single(samples),), detail, batching, is_list=False)
    if not isinstance(samples, list):
        got = "nothing" if "samples" not in content else _type_of(samples)
        raise _invalid(f"samples must be a sample or a list of samples, got {got}")
    if not samples:
        raise _invalid("samples must not be empty")
    if len(samples) > max_samples:
        raise RequestError(
            "too_large",
            f"samples must be at most {max_samples:,} in one request, got {len(samples):,}",
        )
    return ParsedRequest(_parse_list(samples), detail, batching, is_list=True)


def _choice(content: Mapping[str, Any], key: str, choices: Sequence[str]) -> Any:  # noqa: ANN401 (a Literal)
    """The value of `key`; the first choice is the default."""
    value = content.get(key, choices[0])
    if value not in choices:
        raise _invalid(f"{key} must be one of {', '.join(choices)}")
    return value


def _parse_list(samples: Sequence[object]) -> tuple[ParsedSample, ...]:
    parsed, malformed = [], []
    for index, entry in enumerate(samples):
        try:
            _check_form(entry, f"samples[{index}]")
        except RequestError as error:
            malformed.append(str(error))
            parsed.append(ParsedSample(_id_of(entry), None, str(error)))
        else:
            parsed.append(_as_sample(entry, f"samples[{index}]"))
    if len(malformed) == len(samples):
        raise _invalid(malformed[0])
    return tuple(parsed)


def _parse_single(sample: dict[str, Any]) -> ParsedSample:
    _check_form(sample, "samples")
    parsed = _as_sample(sample, "samples")
    if parsed.sample is None:
        raise _invalid(parsed.error)
    return parsed


def _check_form(entry: object, location: str) -> None:
    """Raises RequestError unless `entry` has the fields of one kind of sample, of their types."""
    if not isinstance(entry, dict):
        raise _invalid(f"{location} must be an object, got {_type_of(entry)}")
    kinds: dict[str, type[WireModel]] = {
        "messages": MessagesSample, "text": TextSample,
        "prompt": PromptSample, "response": PromptSample,
    }  # fmt: skip
    kind = next((kinds[key] for key in kinds if key in entry), None)
    _refuse_unknown_fields(entry, (*kinds, "id", "dataset"), prefix=f"{location}.")
    if kind is None:
        raise _invalid(f"{location} must have 'messages', 'text', or 'prompt' and 'response'")
    try:
        kind.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _invalid(f"{location}{_path(first['loc'])}: {_sentence(first)}") from None


def _as_sample(entry: Any, location: str) -> ParsedSample:  # noqa: ANN401 (JSON, checked in form)
    # The select job parses its rows with the same function, so both reject the same samples.
    row = parse_row(entry, RowLocation(file=location, row=1, dataset=""))
    if isinstance(row, RejectedRow):
        return ParsedSample(_id_of(entry), None, f"{location}: {row.detail}")
    return ParsedSample(_id_of(entry), row)


def _refuse_unknown_fields(
    content: Mapping[str, object], known: Sequence[str], *, prefix: str
) -> None:
    unknown = [key for key in content if key not in known]
    if not unknown:
        return
    for key in unknown:
        if key in PAIR_FIELDS:
            raise _invalid(f"{prefix}{key} is not a field here: {PAIR_HINT}")
    name = ascii(unknown[0][:MAX_FIELD_CHARACTERS])[1:-1]
    raise _invalid(f"{prefix}{name} is not a field here; known are {', '.join(known)}")


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _invalid(f"the body must be JSON in UTF-8: {reason}") from None


def _sentence(error: Any) -> str:  # noqa: ANN401 (pydantic's description of an error)
    if error["type"] == "literal_error" and error["loc"][-1] == "role":
        return f"must be one of {', '.join(ROLES)}"
    if error["type"] == "extra_forbidden":
        return "is not a field here"
    if error["type"] == "too_short":
        return "must not be empty"
    return str(error["msg"]).lower()


def _path(location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return ascii("".join(parts))[1:-1]


def _id_of(entry: object) -> str | None:
    name = entry.get("id") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _type_of(content: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number",
             float: "a number", type(None): "null"}  # fmt: skip
    return names[type(content)]


def _invalid(error: str) -> RequestError:
    return RequestError("validation", error)
