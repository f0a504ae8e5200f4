"""What travels over the wire, and how a request becomes samples: wire types never leak inwards."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selectmoe.data.rows import ROLES, RowLocation, parse_row
from selectmoe.records import RejectedRow, Sample
from serve.error_responses import RequestError

Detail = Literal["sample", "layers", "tokens"]
Batching = Literal["shared", "own"]
PAIR_FIELDS = ("text_1", "text_2", "query", "documents")
_PAIR_POINTER = (
    "this endpoint scores single samples, each an instruction with its answer; it does not compare "
    'pairs of texts: send {"samples": [{"prompt": "…", "response": "…"}]}'
)
_SHOWN_FIELD_CHARACTERS = 60


class WireModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class WireMessage(WireModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class _Named(WireModel):
    id: str | None = Field(None, description="A name of yours; the result repeats it.")
    dataset: str | None = Field(None, description="Where the sample is from; changes nothing.")


class MessagesSample(_Named):
    """A conversation; all assistant turns are scored."""

    messages: Annotated[list[WireMessage], Field(min_length=1)]


class PromptSample(_Named):
    """An instruction and its answer."""

    prompt: str
    response: str


class TextSample(_Named):
    """A text that is scored as one assistant turn."""

    text: str


WireSample = MessagesSample | PromptSample | TextSample


class ScoreRequest(WireModel):
    """One sample or a list of them."""

    samples: WireSample | Annotated[list[WireSample], Field(min_length=1)]
    detail: Detail = Field(
        "sample", description="Adds the scores of each layer, or of each token, to the results."
    )
    batching: Batching = Field(
        "shared",
        description="own keeps the samples of other requests out of this one's forward passes: "
        "scores then repeat to the last digit, whatever the traffic, and short lists take longer.",
    )


class TokenResult(WireModel):
    """One token of the conversation as the model reads it."""

    text: str
    start: int = Field(description="First character in the rendered conversation.")
    end: int
    is_answer: bool = Field(description="Whether the assistant says it.")
    score: float = Field(ge=0, le=1)


class SampleResult(WireModel):
    """A sample with a score."""

    id: str | None
    score: float = Field(ge=0, le=1, description="Higher is better.")
    percentile: float | None = Field(
        description="Share of the calibration corpus that scores below, in percent."
    )
    keep_at_pct: float | None = Field(
        description="Smallest percentage of the calibration corpus that still holds this score."
    )
    num_tokens: int
    num_answer_tokens: int = Field(description="Of these, the assistant's.")
    truncated: bool = Field(description="Whether the model read only the sample's beginning.")
    layers: list[float] | None = Field(None, description='With "detail": "layers".')
    tokens: list[TokenResult] | None = Field(None, description='With "detail": "tokens".')


class SampleError(WireModel):
    """A sample of a list that has no score; its neighbours have theirs."""

    id: str | None
    error: str
    error_type: Literal["validation", "internal"]
    reason: str = Field(description="As in rejected.jsonl of the select job: chat_template, …")


class CalibrationInfo(WireModel):
    """The corpus by which percentiles are told."""

    formula: str
    num_samples: int
    weights_hash: str


class Usage(WireModel):
    tokens: int = Field(description="Tokens that the model read for this request.")


class ScoreResponse(WireModel):
    """`results` has one entry a sample, in the order of the request."""

    results: list[SampleResult | SampleError]
    model: str
    revision: str | None
    calibration: CalibrationInfo | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class ParsedSample:
    """One sample of a request, or why it is none."""

    wire_id: str | None  # as the client named it
    sample: Sample | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    samples: tuple[ParsedSample, ...]
    detail: Detail
    batching: Batching
    is_list: bool


def parse_request(body: bytes, *, max_samples: int) -> ParsedRequest:
    """Raises RequestError for what is wrong with the request as a whole.

    A sample of a list that is wrong carries its own error, unless none of the list is well-formed:
    then it is the caller's program that is wrong, not the corpus.
    """
    content = _json(body)
    if not isinstance(content, dict):
        raise _invalid(f"the body must be a JSON object with 'samples', got {_type_of(content)}")
    _refuse_unknown_fields(content, ("samples", "detail", "batching"), place="")
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


def _choice(content: Mapping[str, Any], key: str, words: Sequence[str]) -> Any:  # noqa: ANN401 (a Literal)
    """The first of the words where none is given."""
    word = content.get(key, words[0])
    if word not in words:
        raise _invalid(f"{key} must be one of {', '.join(words)}")
    return word


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


def _check_form(entry: object, place: str) -> None:
    """Raises RequestError unless `entry` has the fields of one kind of sample, of their types."""
    if not isinstance(entry, dict):
        raise _invalid(f"{place} must be an object, got {_type_of(entry)}")
    kinds: dict[str, type[WireModel]] = {
        "messages": MessagesSample, "text": TextSample,
        "prompt": PromptSample, "response": PromptSample,
    }  # fmt: skip
    kind = next((kinds[key] for key in kinds if key in entry), None)
    _refuse_unknown_fields(entry, (*kinds, "id", "dataset"), place=f"{place}.")
    if kind is None:
        raise _invalid(f"{place} must have 'messages', 'text', or 'prompt' and 'response'")
    try:
        kind.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _invalid(f"{place}{_path(first['loc'])}: {_sentence(first)}") from None


def _as_sample(entry: Any, place: str) -> ParsedSample:  # noqa: ANN401 (JSON, checked in form)
    # The same reader of rows as the select job's, so that both refuse the same.
    row = parse_row(entry, RowLocation(file=place, row=1, dataset=""))
    if isinstance(row, RejectedRow):
        return ParsedSample(_id_of(entry), None, f"{place}: {row.detail}")
    return ParsedSample(_id_of(entry), row)


def _refuse_unknown_fields(
    content: Mapping[str, object], known: Sequence[str], *, place: str
) -> None:
    unknown = [key for key in content if key not in known]
    if not unknown:
        return
    name = ascii(unknown[0][:_SHOWN_FIELD_CHARACTERS])
    if any(key in PAIR_FIELDS for key in unknown):
        pair = next(key for key in unknown if key in PAIR_FIELDS)
        raise _invalid(f"{place}{pair} is not a field here: {_PAIR_POINTER}")
    raise _invalid(f"{place}{name[1:-1]} is not a field here; known are {', '.join(known)}")


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise _invalid(f"the body must be JSON in UTF-8: {reason}") from None


def _sentence(error: Any) -> str:  # noqa: ANN401 (pydantic's description of one error)
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
