"""The pydantic models of request and response bodies.

The values shared with clients (detail levels, error types, statuses) are in
selectmoe/client/wire.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from selectmoe.client.wire import STATUS_BY_ERROR_TYPE, Batching, Detail, SampleErrorType
from selectmoe.config.engine import Length, Turns


class WireModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RowModel(BaseModel):
    """A part of a sample, as a row of a corpus has it; `selectmoe/data/layouts.py` reads it."""

    model_config = ConfigDict(extra="allow")


class TextPart(RowModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class WireMessage(RowModel):
    """One turn of a conversation. `weight` 0 and `train` false make an answer a part of the
    context; `reasoning_content` and `tool_calls` are written by the chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None


class NamedSample(RowModel):
    """Fields that no layout reads are ignored, so a row of selected_data.jsonl is a sample."""

    id: str | int | None = Field(
        default=None, description="Identifier that the result repeats, as text."
    )
    dataset: str | int | None = Field(
        default=None, description="Source of the sample; does not affect scores."
    )
    system: str | None = Field(default=None, description="A system turn before the others.")
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Functions that the assistant may call."
    )


class MessagesSample(NamedSample):
    """A conversation; its assistant turns are scored, except those that are not trained on."""

    messages: Annotated[list[WireMessage], Field(min_length=1)]


class ShareGptTurn(RowModel):
    from_: Literal["system", "human", "gpt", "tool"] = Field(alias="from")
    value: str


class ShareGptSample(NamedSample):
    """A conversation in the layout of ShareGPT."""

    conversations: Annotated[list[ShareGptTurn], Field(min_length=1)]


class PromptSample(NamedSample):
    """An instruction with its answer."""

    prompt: str
    response: str


class AlpacaSample(NamedSample):
    """An instruction with its answer in the layout of Alpaca."""

    instruction: str
    input: str | None = None
    output: str
    history: list[tuple[str, str]] | None = Field(
        default=None, description="Earlier questions and answers."
    )


class DollySample(NamedSample):
    """An instruction with its answer in the layout of Dolly."""

    instruction: str
    context: str | None = None
    response: str


class CompletionSample(NamedSample):
    """An instruction with its answer in the layout of TRL."""

    prompt: str
    completion: str


class QuestionSample(NamedSample):
    """A question with its answer."""

    question: str
    answer: str


class TextSample(NamedSample):
    """A text, scored as one assistant turn."""

    text: str


WireSample = (
    MessagesSample
    | ShareGptSample
    | PromptSample
    | AlpacaSample
    | DollySample
    | CompletionSample
    | QuestionSample
    | TextSample
)


class ScoreOptions(WireModel):
    """What to compute for all samples of a request."""

    detail: Detail = Field(
        default="sample",
        description="layers or tokens adds the scores of each layer or token to results.",
    )
    batching: Batching = Field(
        default="shared",
        description="own keeps the samples of other requests out of this request's forward passes: "
        "its scores are then reproducible to the last digit, and short lists take longer.",
    )


class ScoreRequest(ScoreOptions):
    """One sample or a list of them."""

    samples: WireSample | Annotated[list[WireSample], Field(min_length=1)]


class TokenResult(WireModel):
    """One token of the conversation as rendered by the chat template."""

    text: str
    start: int = Field(description="First character in the rendered conversation.")
    end: int
    is_answer: bool = Field(description="Whether it belongs to an assistant turn.")
    score: float = Field(ge=0, le=1)


class SampleResult(WireModel):
    """The score of a sample."""

    id: str | None
    score: float = Field(ge=0, le=1, description="Higher is better.")
    percentile: float | None = Field(
        description="Percentage of the calibration corpus that scores lower; null without one."
    )
    num_tokens: int
    num_answer_tokens: int = Field(description="Tokens of assistant turns.")
    truncated: bool = Field(description="Whether the sample exceeded max_sequence_length.")
    layers: list[float] | None = Field(default=None, description='With "detail": "layers".')
    tokens: list[TokenResult] | None = Field(default=None, description='With "detail": "tokens".')


class SampleError(WireModel):
    """Why a sample of a list has no score; the other samples keep theirs."""

    id: str | None
    error: str
    error_type: SampleErrorType
    reason: str = Field(description="As in rejected.jsonl of the select job: empty_answer, …")


class CalibrationInfo(WireModel):
    """The corpus that percentiles refer to."""

    formula: str
    num_samples: int
    weights_hash: str


class Usage(WireModel):
    tokens: int = Field(description="Tokens that the model processed for this request.")


class ScoreResponse(WireModel):
    """`results` has one entry for each sample, in the order of the request."""

    results: list[SampleResult | SampleError]
    model: str
    revision: str | None
    calibration: CalibrationInfo | None
    usage: Usage


class Limits(WireModel):
    """What one sample, batch or request may hold; see serve/settings.py."""

    max_sequence_length: int
    max_tokens_per_batch: int
    max_samples_per_request: int
    max_body_bytes: int
    max_queued_samples: int
    request_timeout_seconds: float


class Info(WireModel):
    """The model that is served, its calibration, and the limits of the service."""

    model: str
    revision: str | None
    weights_hash: str = Field(description="SHA-256 of the weights.")
    formula: str
    length: Length = Field(
        description="adjusted: a score is read against answers of similar length; or raw."
    )
    turns: Turns = Field(description="Assistant turns that are scored.")
    device: str
    dtype: str
    num_layers: int
    calibration: dict[str, Any] | None = Field(description="Content of calibration.json.")
    limits: Limits
    versions: dict[str, str]


class Health(WireModel):
    status: Literal["live", "ready"]


class ErrorResponse(WireModel):
    """The body of every response that is not a 200."""

    error: str = Field(description="What is wrong, as a sentence for people.")
    error_type: str = Field(
        description="The kind of error, as a key for programs.",
        json_schema_extra={"enum": list(STATUS_BY_ERROR_TYPE)},
    )
