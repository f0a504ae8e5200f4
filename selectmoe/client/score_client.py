"""ScoreClient and AsyncScoreClient: the sockets of a dialogue with a score server.

What is said and how answers are read is in `requests.py`.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from selectmoe.client.requests import (
    Answer,
    Batching,
    Detail,
    Dialogue,
    EncodedBatch,
    NoAnswer,
    Outcome,
    Request,
    RetryPolicy,
    ScoreDialogues,
    ScoreFailure,
    ScoreResult,
    ServerInfo,
    Step,
    T,
    Wait,
    encode_batches,
)
from selectmoe.errors import ConfigError, ScoreRejectedError
from selectmoe.records import Sample

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "SELECTMOE_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
# A host that is there answers a connection at once, whatever it computes.
CONNECT_TIMEOUT_SECONDS = 5.0


class _Client:
    """What both clients know: the server, what to say to it, and its limits once it told them."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_seconds: float = 60.0
    ) -> None:
        """url: the server's root. timeout_seconds: for one request, trying again included."""
        self.url = checked_url(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {checked_key(api_key)}"
        policy = RetryPolicy(timeout_seconds)
        self._dialogues = ScoreDialogues(self.url, has_key=api_key is not None, policy=policy)
        self._info: ServerInfo | None = None
        self._httpx = import_httpx()

    @classmethod
    def from_environment(cls, url: str = DEFAULT_URL, *, timeout_seconds: float = 60.0) -> Self:
        """A client with the key in SELECTMOE_API_KEY, if there is one."""
        api_key = os.environ.get(API_KEY_VARIABLE) or None
        return cls(url, api_key=api_key, timeout_seconds=timeout_seconds)

    def _batches(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        info: ServerInfo | None,
        detail: Detail,
        batching: Batching,
    ) -> list[EncodedBatch]:
        limits = {}
        if info is not None:
            limits = {"max_samples": info.max_samples, "max_body_bytes": info.max_body_bytes}
        return list(encode_batches(samples, detail=detail, batching=batching, **limits))

    def _timeout(self, request: Request) -> "httpx.Timeout":
        left = request.timeout_seconds
        timeout: httpx.Timeout = self._httpx.Timeout(
            left, connect=min(CONNECT_TIMEOUT_SECONDS, left)
        )
        return timeout


class ScoreClient(_Client):
    """Scores samples through a server; keeps its connections, and may be used by many threads."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_seconds: float = 60.0
    ) -> None:
        super().__init__(url, api_key=api_key, timeout_seconds=timeout_seconds)
        self._http = self._httpx.Client(base_url=self.url, headers=self._headers)

    def info(self) -> ServerInfo:
        """What the server scores with, and its limits; asked for once."""
        if self._info is None:
            self._info = self._run(self._dialogues.info())
        return self._info

    def score(
        self, sample: Sample | Mapping[str, Any], *, detail: Detail = "sample"
    ) -> ScoreResult:
        """The score of one sample. Raises ScoreRejectedError where the server has none for it."""
        [batch] = self._batches([sample], None, detail, "shared")
        [result] = self._run(self._dialogues.score(batch))
        return scored(result)

    def score_many(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        *,
        detail: Detail = "sample",
        batching: Batching = "shared",
    ) -> list[ScoreResult | ScoreFailure]:
        """One answer a sample, in their order, by as many requests as the server's limits ask for.

        batching: "own" keeps the samples of a request from being packed with those of others.
        Scores then repeat to the last digit; short lists take longer.
        """
        batches = self._batches(samples, self.info(), detail, batching) if samples else []
        return [answer for b in batches for answer in self._run(self._dialogues.score(b))]

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, dialogue: Dialogue[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = dialogue.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            outcome = self._perform(step)

    def _perform(self, step: Step) -> Outcome:
        if isinstance(step, Wait):
            time.sleep(step.seconds)
            return None
        try:
            response = self._http.request(
                step.method, step.path, content=step.body, timeout=self._timeout(step)
            )
        except self._httpx.TransportError as error:
            return no_answer(error)
        return answer_of(response)


class AsyncScoreClient(_Client):
    """The same for asyncio; a list that is split has `max_in_flight` requests under way at once."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        max_in_flight: int = 4,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout_seconds=timeout_seconds)
        if max_in_flight < 1:
            raise ConfigError(f"max_in_flight must be at least 1, got {max_in_flight}")
        self.max_in_flight = max_in_flight
        self._http = self._httpx.AsyncClient(base_url=self.url, headers=self._headers)

    async def info(self) -> ServerInfo:
        """What the server scores with, and its limits; asked for once."""
        if self._info is None:
            self._info = await self._run(self._dialogues.info())
        return self._info

    async def score(
        self, sample: Sample | Mapping[str, Any], *, detail: Detail = "sample"
    ) -> ScoreResult:
        """The score of one sample. Raises ScoreRejectedError where the server has none for it."""
        [batch] = self._batches([sample], None, detail, "shared")
        [result] = await self._run(self._dialogues.score(batch))
        return scored(result)

    async def score_many(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        *,
        detail: Detail = "sample",
        batching: Batching = "shared",
    ) -> list[ScoreResult | ScoreFailure]:
        """One answer a sample, in their order; see ScoreClient.score_many."""
        batches = self._batches(samples, await self.info(), detail, batching) if samples else []
        free = asyncio.Semaphore(self.max_in_flight)

        async def answers_to(batch: EncodedBatch) -> list[ScoreResult | ScoreFailure]:
            async with free:
                return await self._run(self._dialogues.score(batch))

        try:
            # The first failure ends the other requests, too: nobody would read their scores.
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answers_to(batch)) for batch in batches]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [answer for task in tasks for answer in task.result()]

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _run(self, dialogue: Dialogue[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = dialogue.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            outcome = await self._perform(step)

    async def _perform(self, step: Step) -> Outcome:
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return None
        try:
            response = await self._http.request(
                step.method, step.path, content=step.body, timeout=self._timeout(step)
            )
        except self._httpx.TransportError as error:
            return no_answer(error)
        return answer_of(response)


def scored(result: ScoreResult | ScoreFailure) -> ScoreResult:
    if isinstance(result, ScoreFailure):
        raise ScoreRejectedError(result.error, error_type=result.error_type)
    return result


def answer_of(response: "httpx.Response") -> Answer:
    return Answer(response.status_code, response.content, response.headers.get("Retry-After"))


def no_answer(error: "httpx.TransportError") -> NoAnswer:
    return NoAnswer(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the server's URL must begin with http:// or https://, got {url!r}")
    return url.rstrip("/")


def checked_key(api_key: str) -> str:
    """Raises ConfigError, without showing the key, for one that no header can hold."""
    if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ConfigError("api_key must be printable ASCII without blanks, and not empty")
    return api_key


def import_httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise ConfigError(
            "selectmoe.client needs httpx, the extra 'client': pip install 'selectmoe[client]'"
        ) from error
    return httpx
