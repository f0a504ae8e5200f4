"""The HTTP protocol of the clients, without I/O: requests, retries and parsing of responses.

A dialogue is a generator. It yields its next step, a `Request` or a `Wait`, receives the outcome of
that step through `send`, and returns the parsed response. `score_client.py` performs the steps,
once with blocking calls and once with `await`.
"""

import email.utils
import itertools
import json
import logging
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from selectmoe.client.wire import RETRIED_STATUSES, Batching, Detail
from selectmoe.data.message_fields import as_json
from selectmoe.errors import (
    ConfigError,
    DataError,
    ScoreRequestError,
    ServerUnavailableError,
    UnauthorizedError,
)
from selectmoe.records import Sample

FIRST_WAIT_SECONDS = 0.25  # before the second attempt; it doubles before each further one
MAX_WAIT_SECONDS = 20.0  # limit of our own waits; a server's Retry-After may be longer
PREVIEW_CHARACTERS = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The score of one token, and the characters of the rendered conversation that it covers."""

    text: str
    start: int
    end: int
    score: float
    is_answer: bool = True  # False: a token of the prompt, which the score does not average


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """The server's result for one sample."""

    sample_id: str | None
    score: float  # in (0, 1), higher is better
    percentile: float | None  # percentage of the server's calibration corpus that scores lower
    num_tokens: int
    num_answer_tokens: int
    truncated: bool
    layers: tuple[float, ...] | None = None  # with detail="layers"
    tokens: tuple[TokenScore, ...] | None = None  # with detail="tokens"


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """Why one sample of a list has no score; the other samples keep theirs."""

    sample_id: str | None
    error: str  # a sentence for people
    error_type: str  # a key of STATUS_BY_ERROR_TYPE, for programs
    reason: str = ""  # more precise, as in rejected.jsonl: "chat_template", "score_not_finite", …


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's model and limits."""

    model: str
    revision: str | None
    weights_hash: str
    formula: str
    dtype: str
    max_sequence_length: int
    max_tokens_per_batch: int
    max_samples: int  # per request
    max_body_bytes: int
    calibration: Mapping[str, Any] | None = field(default=None, repr=False)
    """Content of calibration.json; None where scores have no percentiles."""
    length: str = "raw"
    """adjusted: scores are read against answers of similar length; or raw."""
    turns: str = "all"
    """Assistant turns that are scored: all or last."""


@dataclass(frozen=True, slots=True)
class Request:
    """A step: send this request; its response may take `timeout_seconds`."""

    method: str
    path: str
    body: bytes | None
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """A step: sleep."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of the server, or of a proxy in front of it."""

    status: int
    body: bytes
    retry_after: str | None = None  # the header Retry-After


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """No response: the connection was refused or lost, or the request timed out."""

    reason: str


T = TypeVar("T")
Step: TypeAlias = Request | Wait
Outcome: TypeAlias = Answer | NoAnswer | None
Dialogue: TypeAlias = Generator[Step, Outcome, T]


def retry_wait(num_tries: int, retry_after: float | None, draw: float) -> float:
    """Seconds until the next attempt; `draw` in [0, 1) is the jitter that spreads clients."""
    backoff = float(min(FIRST_WAIT_SECONDS * 2 ** min(num_tries - 1, 30), MAX_WAIT_SECONDS))
    # Never before the server's Retry-After; without one, in the second half of the backoff.
    return backoff * (1 + draw) / 2 if retry_after is None else retry_after + backoff * draw


@dataclass(frozen=True, slots=True)
class ScoreDialogues:
    """The dialogues with one server."""

    url: str
    has_key: bool
    timeout_seconds: float  # of one request, with all its attempts
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds < math.inf:
            raise ConfigError(f"timeout_seconds must be above 0, got {self.timeout_seconds!r}")

    def info(self) -> Dialogue[ServerInfo]:
        answer = yield from self._request("GET", "/info", None)
        return self._parsed(answer, "/info", parse_info)

    def score(self, batch: "EncodedBatch") -> Dialogue[list[ScoreResult | ScoreFailure]]:
        answer = yield from self._request("POST", "/score", batch.body)
        num_samples = len(batch.sample_ids)
        if answer.status == 422 or (answer.status == 413 and num_samples == 1):
            # No sample of this request is valid, or its only one is too large. Samples of the same
            # list that went in other requests keep their scores.
            return [ScoreFailure(name, *error_of(answer)) for name in batch.sample_ids]
        return self._parsed(answer, "/score", lambda content: parse_results(content, num_samples))

    def _request(self, method: str, path: str, body: bytes | None) -> Dialogue[Answer]:
        deadline = self.clock() + self.timeout_seconds
        for num_tries in itertools.count(1):
            left = max(deadline - self.clock(), 0.001)
            outcome = yield Request(method, path, body, timeout_seconds=left)
            if isinstance(outcome, Answer):
                if outcome.status not in RETRIED_STATUSES:
                    return outcome
                status, retry_after = outcome.status, retry_after_seconds(outcome)
                problem = f"{status}: {error_of(outcome)[0]}"
            else:
                assert outcome is not None
                status, retry_after, problem = None, None, outcome.reason
            seconds = retry_wait(num_tries, retry_after, self.draw())
            if self.clock() + seconds >= deadline:
                raise ServerUnavailableError(
                    f"{self.url}: not available within {self.timeout_seconds:g} s "
                    f"(tries: {num_tries}): {problem}",
                    status=status,
                )
            logger.info("%s: %s; trying again in %.1f s", self.url, problem, seconds)
            yield Wait(seconds)
        raise AssertionError("unreachable: the loop has no end")

    def _parsed(self, answer: Answer, path: str, parse: Callable[[dict[str, Any]], T]) -> T:
        """Raises ScoreRequestError for a status other than 200, or an unexpected body."""
        if answer.status != 200:
            raise self._refusal(answer, path)
        content = json_object(answer.body)
        try:
            if content is None:
                raise ValueError(f"no JSON object: {preview(answer.body)}")
            return parse(content)
        except (LookupError, TypeError, ValueError) as error:
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ScoreRequestError(
                f"{self.url}: not the answer of a score server: {reason}"
            ) from error

    def _refusal(self, answer: Answer, path: str) -> ScoreRequestError:
        message, error_type = error_of(answer)
        if answer.status not in (401, 403):
            text = f"{self.url}{path} answered {answer.status}: {message}"
            return ScoreRequestError(text, status=answer.status, error_type=error_type)
        hint = "the API key that was sent is not the server's"
        if not self.has_key:
            hint = "no API key was sent (api_key, or SELECTMOE_API_KEY in the environment)"
        text = f"{self.url}: {message}; {hint}"
        return UnauthorizedError(text, status=answer.status, error_type=error_type)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The body of one request."""

    body: bytes
    sample_ids: tuple[str | None, ...]


def encode_batches(
    samples: Sequence[Sample | Mapping[str, Any]],
    *,
    detail: Detail = "sample",
    batching: Batching = "shared",
    max_samples: int | None = None,
    max_body_bytes: int | None = None,
) -> Iterator[EncodedBatch]:
    """Encodes the samples, in order, as few requests as the server's limits allow.

    A sample that exceeds `max_body_bytes` becomes a request of its own, which the server refuses.
    """
    options: dict[str, str] = {"detail": detail}
    if batching != "shared":
        options["batching"] = batching
    head = json.dumps(options)[:-1].encode() + b', "samples": ['
    encoded = [encode_sample(sample, index) for index, sample in enumerate(samples)]
    names = iter(map(_id_of, samples))
    for entries in _grouped(encoded, max_samples, max_body_bytes, overhead=len(head) + 1):
        body = head + b",".join(entries) + b"]}"
        yield EncodedBatch(body, tuple(itertools.islice(names, len(entries))))


def _id_of(sample: Sample | Mapping[str, Any]) -> str | None:
    name = sample.sample_id if isinstance(sample, Sample) else sample.get("id")
    is_number = isinstance(name, int) and not isinstance(name, bool)
    return str(name) if is_number or isinstance(name, str) else None


def encode_sample(sample: Sample | Mapping[str, Any], index: int) -> bytes:
    """Encodes a sample as JSON; a mapping is sent unchanged, and the server validates it."""
    if isinstance(sample, Sample):
        tools = {"tools": json.loads(sample.tools)} if sample.tools else {}
        turns = [as_json(turn) for turn in sample.messages]
        sample = {"id": sample.sample_id, "messages": turns, **tools}
    if not isinstance(sample, Mapping):
        raise DataError(
            f"samples[{index}] must be a mapping or a selectmoe.Sample, got {type(sample).__name__}"
        )
    try:
        text = json.dumps(dict(sample), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"samples[{index}] cannot be written as JSON: {error}") from error
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A lone surrogate: sent as an escape, so that the server rejects only this sample.
        return json.dumps(dict(sample)).encode()


def _grouped(
    entries: Sequence[bytes], max_samples: int | None, max_bytes: int | None, *, overhead: int
) -> Iterator[list[bytes]]:
    """Groups entries by both limits.

    A request has `overhead` bytes, and one more than its length for each entry: n entries need
    n - 1 commas and two brackets.
    """
    group: list[bytes] = []
    num_bytes = overhead
    for entry in entries:
        is_full = max_samples is not None and len(group) >= max_samples
        is_long = max_bytes is not None and num_bytes + len(entry) + 1 > max_bytes
        if group and (is_full or is_long):
            yield group
            group, num_bytes = [], overhead
        group.append(entry)
        num_bytes += len(entry) + 1
    if group:
        yield group


def parse_info(content: Mapping[str, Any]) -> ServerInfo:
    limits = content["limits"]
    return ServerInfo(
        model=str(content["model"]),
        revision=content.get("revision"),
        weights_hash=str(content["weights_hash"]),
        formula=str(content["formula"]),
        dtype=str(content["dtype"]),
        max_sequence_length=int(limits["max_sequence_length"]),
        max_tokens_per_batch=int(limits["max_tokens_per_batch"]),
        max_samples=int(limits["max_samples_per_request"]),
        max_body_bytes=int(limits["max_body_bytes"]),
        calibration=content.get("calibration"),
        length=str(content.get("length", "raw")),  # older servers know no other
        turns=str(content.get("turns", "all")),
    )


def parse_results(content: Mapping[str, Any], num_samples: int) -> list[ScoreResult | ScoreFailure]:
    """One result for each sample, in their order."""
    results = [parse_result(entry) for entry in content["results"]]
    if len(results) != num_samples:
        raise ValueError(f"{len(results)} results for {num_samples} samples")
    return results


def parse_result(entry: Mapping[str, Any]) -> ScoreResult | ScoreFailure:
    if "error" in entry:
        error, error_type = str(entry["error"]), str(entry["error_type"])
        return ScoreFailure(entry.get("id"), error, error_type, str(entry.get("reason", "")))
    layers, tokens = entry.get("layers"), entry.get("tokens")
    return ScoreResult(
        sample_id=entry.get("id"),
        score=float(entry["score"]),
        percentile=entry.get("percentile"),
        num_tokens=int(entry["num_tokens"]),
        num_answer_tokens=int(entry["num_answer_tokens"]),
        truncated=bool(entry["truncated"]),
        layers=None if layers is None else tuple(map(float, layers)),
        tokens=None if tokens is None else tuple(map(parse_token, tokens)),
    )


def parse_token(entry: Mapping[str, Any]) -> TokenScore:
    return TokenScore(
        str(entry["text"]),
        int(entry["start"]),
        int(entry["end"]),
        float(entry["score"]),
        bool(entry["is_answer"]),
    )


def retry_after_seconds(answer: Answer, now: Callable[[], float] = time.time) -> float | None:
    """Parses the header Retry-After, a number of seconds or a date; None for anything else."""
    text = (answer.retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - now(), 0.0)
    except ValueError:
        return None


def error_of(answer: Answer) -> tuple[str, str]:
    """The server's message and error_type; for a proxy's error, a preview of its body and ""."""
    content = json_object(answer.body) or {}
    if isinstance(content.get("error"), str):
        return content["error"], str(content.get("error_type", ""))
    return preview(answer.body) or "no reason given", ""


def json_object(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def preview(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + "…"
