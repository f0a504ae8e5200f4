"""Parses the body of POST /score into samples; a refusal names the invalid field."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from selectmoe.config.columns import ColumnRules
from selectmoe.data.json_text import is_encodable
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.records import Sample, UnscoredSample
from serve.error_responses import RequestError
from serve.schemas import ScoreOptions, ScoreRequest, WireModel

PAIR_FIELDS = ("text_1", "text_2", "query", "documents")
PAIR_HINT = (
    "this endpoint scores single samples, each an instruction with its answer; it does not compare "
    'pairs of texts: send {"samples": [{"prompt": "…", "response": "…"}]}'
)
PAIR_RULE = f"is not a field here: {PAIR_HINT}"
MALFORMED = (
    "not_an_object",
    "unknown_layout",
    "unknown_role",
    "messages_wrong_type",
    "messages_empty",
    "history_wrong_type",
    "tools_wrong_type",
    "tool_calls_wrong_type",
)
"""Reasons that are the fault of a program, which has built a sample of another form."""
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

    A sample has any layout of a row of a corpus; an invalid one of a list carries its own error,
    with the reason of rejected.jsonl. If no sample of the list is well-formed, the fault is in the
    calling program and not in the corpus, so the whole request is refused.
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
    parsed = [_parse_sample(entry, f"samples[{index}]") for index, entry in enumerate(samples)]
    if all(_is_malformed(entry.sample) for entry in parsed):
        first = parsed[0].sample
        assert isinstance(first, UnscoredSample)
        raise _invalid(first.detail)
    return tuple(parsed)


def _parse_single(sample: dict[str, Any]) -> ParsedSample:
    parsed = _parse_sample(sample, "samples")
    if isinstance(parsed.sample, UnscoredSample):
        raise _invalid(parsed.sample.detail)
    return parsed


def _parse_sample(entry: object, location: str) -> ParsedSample:
    # The select job parses its rows with the same function, so both reject the same samples.
    place = RowLocation(file=location, row=1, dataset="")
    row = parse_row(entry, place, ColumnRules(keeps_extra=False))
    has_id = isinstance(entry, dict) and entry.get("id") is not None
    # Without an id a row is named after its place, which says nothing to the client.
    wire_id = row.sample_id if has_id and row.sample_id != f"{location}:1" else None
    if isinstance(row, Sample):
        name = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(name, str) and not is_encodable(name):
            # A row of a corpus loses such an id; here the client would not find its result.
            detail = f"{location}: 'id' must be valid Unicode"
            return ParsedSample(None, UnscoredSample("", "lone_surrogate", detail))
        return ParsedSample(wire_id, row)
    detail = f"{location}: {row.detail}"
    if row.reason == "unknown_layout":
        pair_fields = [field for field in PAIR_FIELDS if isinstance(entry, dict) and field in entry]
        detail += f"; {pair_fields[0]} {PAIR_RULE}" if pair_fields else ""
    return ParsedSample(wire_id, UnscoredSample(row.sample_id, row.reason, detail))


def _is_malformed(sample: Sample | UnscoredSample) -> bool:
    return isinstance(sample, UnscoredSample) and sample.reason in MALFORMED


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
            return PAIR_RULE
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


def _type_of(content: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number",
             float: "a number", type(None): "null"}  # fmt: skip
    return names[type(content)]


def _invalid(error: str) -> RequestError:
    return RequestError("validation", error)
