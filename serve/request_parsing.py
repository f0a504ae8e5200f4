"""Parses the body of POST /score into samples; a refusal names the invalid field."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from selectmoe.data.rows import RowLocation, is_encodable, parse_row
from selectmoe.records import RejectedRow, Sample, UnscoredSample
from serve.error_responses import RequestError
from serve.schemas import (
    MessagesSample,
    NamedSample,
    PromptSample,
    ScoreOptions,
    ScoreRequest,
    TextSample,
    WireModel,
)

PAIR_FIELDS = ("text_1", "text_2", "query", "documents")
PAIR_HINT = (
    "this endpoint scores single samples, each an instruction with its answer; it does not compare "
    'pairs of texts: send {"samples": [{"prompt": "…", "response": "…"}]}'
)
SAMPLE_KINDS: dict[str, type[NamedSample]] = {
    "messages": MessagesSample,
    "text": TextSample,
    "prompt": PromptSample,
    "response": PromptSample,
}
Model = TypeVar("Model", bound=WireModel)


@dataclass(frozen=True, slots=True)
class ParsedSample:
    """One sample of a request, or why it is invalid."""

    wire_id: str | None  # the client's identifier
    sample: Sample | UnscoredSample


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    samples: tuple[ParsedSample, ...]
    options: ScoreOptions
    is_list: bool


def parse_request(body: bytes, *, max_samples: int) -> ParsedRequest:
    """Raises RequestError if the request as a whole is invalid.

    An invalid sample of a list carries its own error. If no sample of the list is well-formed, the
    fault is in the calling program and not in the corpus, so the whole request is refused.
    """
    content = _json(body)
    if not isinstance(content, dict):
        raise _invalid(f"the body must be a JSON object with 'samples', got {_type_of(content)}")
    given = {key: value for key, value in content.items() if key != "samples"}
    options = _validate(ScoreOptions, given, "", known=ScoreRequest.model_fields)
    samples = content.get("samples")
    if isinstance(samples, dict):
        return ParsedRequest((_parse_single(samples),), options, is_list=False)
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
    return ParsedRequest(_parse_list(samples), options, is_list=True)


def _parse_list(samples: Sequence[object]) -> tuple[ParsedSample, ...]:
    parsed, malformed = [], []
    for index, entry in enumerate(samples):
        try:
            _check_form(entry, f"samples[{index}]")
        except RequestError as error:
            malformed.append(str(error))
            parsed.append(_as_invalid(entry, str(error)))
        else:
            parsed.append(_as_sample(entry, f"samples[{index}]"))
    if len(malformed) == len(samples):
        raise _invalid(malformed[0])
    return tuple(parsed)


def _parse_single(sample: dict[str, Any]) -> ParsedSample:
    _check_form(sample, "samples")
    parsed = _as_sample(sample, "samples")
    if isinstance(parsed.sample, UnscoredSample):
        raise _invalid(parsed.sample.detail)
    return parsed


def _check_form(entry: object, location: str) -> None:
    """Raises RequestError unless `entry` has the fields of one kind of sample, of their types."""
    if not isinstance(entry, dict):
        raise _invalid(f"{location} must be an object, got {_type_of(entry)}")
    kind = next((SAMPLE_KINDS[key] for key in SAMPLE_KINDS if key in entry), NamedSample)
    _validate(kind, entry, f"{location}.", known=(*SAMPLE_KINDS, *NamedSample.model_fields))
    if kind is NamedSample:
        raise _invalid(f"{location} must have 'messages', 'text', or 'prompt' and 'response'")


def _as_sample(entry: Any, location: str) -> ParsedSample:  # noqa: ANN401 (JSON, checked in form)
    # The select job parses its rows with the same function, so both reject the same samples.
    row = parse_row(entry, RowLocation(file=location, row=1, dataset=""))
    if isinstance(row, RejectedRow):
        return _as_invalid(entry, f"{location}: {row.detail}")
    name = _id_of(entry)
    if name is not None and not is_encodable(name):  # a corpus row loses it; a response has it
        return _as_invalid(entry, f"{location}: 'id' must be valid Unicode")
    return ParsedSample(name, row)


def _as_invalid(entry: object, detail: str) -> ParsedSample:
    return ParsedSample(_id_of(entry), UnscoredSample("", "validation", detail))


def _validate(model: type[Model], content: object, prefix: str, *, known: Iterable[str]) -> Model:
    """Raises RequestError for an invalid field; `known` are the fields that a message lists."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # Unknown fields first: one is often the misspelt name of a field that is missing.
        errors = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        rule = _rule(errors[0], known)
        raise _invalid(f"{prefix}{_path(errors[0]['loc'])}: {rule}") from None


def _rule(error: ErrorDetails, known: Iterable[str]) -> str:
    if error["type"] == "extra_forbidden":
        if error["loc"][0] in PAIR_FIELDS:
            return f"is not a field here: {PAIR_HINT}"
        return f"is not a field here; known are {', '.join(known)}"
    if error["type"] == "literal_error":
        return f"must be {error['ctx']['expected']}"
    return "must not be empty" if error["type"] == "too_short" else error["msg"].lower()


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _invalid(f"the body must be JSON in UTF-8: {reason}") from None


def _path(location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in location]
    return ascii("".join(parts).removeprefix("."))[1:-1]


def _id_of(entry: object) -> str | None:
    name = entry.get("id") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _type_of(content: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number",
             float: "a number", type(None): "null"}  # fmt: skip
    return names[type(content)]


def _invalid(error: str) -> RequestError:
    return RequestError("validation", error)
