"""What a client says to a score server, and how it reads the answer: no socket in sight.

A dialogue is a generator. It yields what is to be done next, a `Request` or a `Wait`, is sent what
came of it, and returns what the server said. `client.py` performs these steps, once with blocking
calls and once with `await`; nothing else differs between its two classes.
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
from typing import Any, Literal, TypeAlias, TypeVar

from selectmoe.errors import (
    ConfigError,
    DataError,
    ScoreRequestError,
    ServerUnavailableError,
    UnauthorizedError,
)
from selectmoe.records import Sample

Detail: TypeAlias = Literal["sample", "layers", "tokens"]
Batching: TypeAlias = Literal["shared", "own"]

# Full queues and servers that start or stop, told by the server or by a proxy before it.
RETRIED_STATUSES = frozenset({429, 502, 503, 504})
FIRST_WAIT_SECONDS = 0.25  # before the second try; twice as long before each further one
MAX_WAIT_SECONDS = 20.0  # of our own choice; a server's Retry-After may be longer
_SHOWN_CHARACTERS = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of a sample, with the characters of the rendered text that it covers."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What the server says of one sample."""

    sample_id: str | None
    score: float  # in (0, 1), higher is better
    percentile: float | None  # share of the server's calibration corpus that scores lower
    keep_at_pct: float | None  # the least --pct at which that corpus would keep the sample
    num_tokens: int
    num_answer_tokens: int
    truncated: bool
    layers: tuple[float, ...] | None = None  # with detail="layers"
    tokens: tuple[TokenScore, ...] | None = None  # with detail="tokens"


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """Why one sample of a list has no score; its neighbours have theirs."""

    sample_id: str | None
    error: str  # a sentence for people
    error_type: str  # a key for programs: "validation", "internal", "too_large"
    reason: str = ""  # a finer one, as in rejected.jsonl: "chat_template", "score_not_finite", …


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server scores with, and what it takes."""

    model: str
    revision: str | None
    weights_hash: str
    formula: str
    dtype: str
    max_sequence_length: int
    max_batch_tokens: int
    max_samples: int  # of one request
    max_body_bytes: int
    calibration: Mapping[str, Any] | None = field(default=None, repr=False)
    """As calibration.json has it; None where scores have no percentiles."""


@dataclass(frozen=True, slots=True)
class Request:
    """Send this, and wait for the answer no longer than that."""

    method: str
    path: str
    body: bytes | None
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    retry_after: str | None = None  # the header


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """What came instead of an answer: a refused or lost connection, or nothing in time."""

    reason: str


T = TypeVar("T")
Step: TypeAlias = Request | Wait
Outcome: TypeAlias = Answer | NoAnswer | None
Dialogue: TypeAlias = Generator[Step, Outcome, T]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a request is tried again, and how long between two tries."""

    timeout_seconds: float  # for one request with all its tries

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds < math.inf:
            raise ConfigError(f"timeout_seconds must be above 0, got {self.timeout_seconds!r}")

    def wait(self, num_tries: int, retry_after: float | None, draw: float) -> float:
        """Seconds until the next try; `draw` in [0, 1) keeps clients from coming back together."""
        own = float(min(FIRST_WAIT_SECONDS * 2 ** min(num_tries - 1, 30), MAX_WAIT_SECONDS))
        # Never sooner than asked; otherwise anywhere in the second half of the wait.
        return own * (1 + draw) / 2 if retry_after is None else retry_after + own * draw


@dataclass(frozen=True, slots=True)
class ScoreDialogues:
    """Every dialogue with one server."""

    url: str
    has_key: bool
    policy: RetryPolicy
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def info(self) -> Dialogue[ServerInfo]:
        answer = yield from self._ask("GET", "/info", None)
        return self._understood(parse_info, self._content("/info", answer))

    def score(self, batch: "EncodedBatch") -> Dialogue[list[ScoreResult | ScoreFailure]]:
        answer = yield from self._ask("POST", "/score", batch.body)
        num_samples = len(batch.sample_ids)
        if answer.status == 422 or (answer.status == 413 and num_samples == 1):
            # None of these samples is well-formed, or the only one is too large. Others of the
            # same list, which went in other requests, keep their scores.
            return [ScoreFailure(name, *error_of(answer)) for name in batch.sample_ids]
        content = self._content("/score", answer)
        return self._understood(lambda found: parse_results(found, num_samples), content)

    def _ask(self, method: str, path: str, body: bytes | None) -> Dialogue[Answer]:
        deadline = self.clock() + self.policy.timeout_seconds
        for num_tries in itertools.count(1):
            left = max(deadline - self.clock(), 0.001)
            outcome = yield Request(method, path, body, timeout_seconds=left)
            assert outcome is not None
            if isinstance(outcome, Answer) and outcome.status not in RETRIED_STATUSES:
                return outcome
            problem = self._problem(outcome)
            asked = retry_after_seconds(outcome) if isinstance(outcome, Answer) else None
            seconds = self.policy.wait(num_tries, asked, self.draw())
            if self.clock() + seconds >= deadline:
                raise ServerUnavailableError(
                    f"{self.url}: not available within {self.policy.timeout_seconds:g} s "
                    f"(tries: {num_tries}): {problem}",
                    status=outcome.status if isinstance(outcome, Answer) else None,
                )
            logger.info("%s: %s; trying again in %.1f s", self.url, problem, seconds)
            yield Wait(seconds)
        raise AssertionError("the loop ends by itself")

    def _content(self, path: str, answer: Answer) -> dict[str, Any]:
        """The JSON object of a good answer; raises for every other one."""
        message, error_type = error_of(answer)
        if answer.status in (401, 403):
            hint = "the API key that was sent is not the server's"
            if not self.has_key:
                hint = "no API key was sent (api_key, or SELECTMOE_API_KEY in the environment)"
            raise UnauthorizedError(
                f"{self.url}: {message}; {hint}", status=answer.status, error_type=error_type
            )
        if answer.status != 200:
            raise ScoreRequestError(
                f"{self.url}{path} answered {answer.status}: {message}",
                status=answer.status,
                error_type=error_type,
            )
        content = json_object(answer.body)
        if content is None:
            raise self._misunderstood(f"no JSON object: {shown(answer.body)}")
        return content

    def _understood(self, parse: Callable[[dict[str, Any]], T], content: dict[str, Any]) -> T:
        try:
            return parse(content)
        except (LookupError, TypeError, ValueError) as error:
            raise self._misunderstood(f"{type(error).__name__}: {error}") from error

    def _misunderstood(self, reason: str) -> ScoreRequestError:
        return ScoreRequestError(f"{self.url}: not the answer of a score server: {reason}")

    def _problem(self, outcome: Answer | NoAnswer) -> str:
        if isinstance(outcome, NoAnswer):
            return outcome.reason
        return f"{outcome.status}: {error_of(outcome)[0]}"


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
    """The samples in order, in as few requests as the server's limits allow.

    A sample that is too large by itself is a request of its own, which the server refuses.
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
    return name if isinstance(name, str) else None


def encode_sample(sample: Sample | Mapping[str, Any], index: int) -> bytes:
    """A sample as JSON; a mapping goes as it is, for the server to judge."""
    if isinstance(sample, Sample):
        turns = [{"role": turn.role, "content": turn.content} for turn in sample.messages]
        sample = {"id": sample.sample_id, "messages": turns}
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
        # A lone surrogate: as an escape it reaches the server, which refuses this sample alone.
        return json.dumps(dict(sample)).encode()


def _grouped(
    entries: Sequence[bytes], max_samples: int | None, max_bytes: int | None, *, overhead: int
) -> Iterator[list[bytes]]:
    """`overhead` and, for each entry, one byte more than it has: n - 1 commas and two brackets."""
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
        max_batch_tokens=int(limits["max_batch_tokens"]),
        max_samples=int(limits["max_samples_per_request"]),
        max_body_bytes=int(limits["max_body_bytes"]),
        calibration=content.get("calibration"),
    )


def parse_results(content: Mapping[str, Any], num_samples: int) -> list[ScoreResult | ScoreFailure]:
    """One result a sample, in their order."""
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
        keep_at_pct=entry.get("keep_at_pct"),
        num_tokens=int(entry["num_tokens"]),
        num_answer_tokens=int(entry["num_answer_tokens"]),
        truncated=bool(entry["truncated"]),
        layers=None if layers is None else tuple(map(float, layers)),
        tokens=None if tokens is None else tuple(map(parse_token, tokens)),
    )


def parse_token(entry: Mapping[str, Any]) -> TokenScore:
    return TokenScore(
        str(entry["text"]), int(entry["start"]), int(entry["end"]), float(entry["score"])
    )


def retry_after_seconds(answer: Answer, now: Callable[[], float] = time.time) -> float | None:
    """What the header Retry-After asks for: seconds, or a date; None where it has neither."""
    text = (answer.retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])  # more is no number of seconds that anybody waits
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - now(), 0.0)
    except ValueError:
        return None


def error_of(answer: Answer) -> tuple[str, str]:
    """The server's sentence and its error_type; what a proxy says instead is shown as it is."""
    content = json_object(answer.body) or {}
    if isinstance(content.get("error"), str):
        return content["error"], str(content.get("error_type", ""))
    return shown(answer.body) or "no reason given", ""


def json_object(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def shown(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
