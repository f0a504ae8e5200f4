"""ScoreClient and AsyncScoreClient, which run the protocol of `requests.py` on httpx."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from selectmoe.client.requests import (
    Answer,
    Dialogue,
    EncodedBatch,
    NoAnswer,
    Outcome,
    Request,
    ScoreDialogues,
    ScoreFailure,
    ScoreResult,
    ServerInfo,
    Step,
    T,
    Wait,
    encode_batches,
)
from selectmoe.client.wire import API_KEY_RULE, Batching, Detail, is_valid_api_key
from selectmoe.errors import ConfigError, ScoreRejectedError
from selectmoe.records import Sample

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "SELECTMOE_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
# A running host accepts a connection at once, whatever it computes.
CONNECT_TIMEOUT_SECONDS = 5.0


class _Client:
    """Common to both clients: the arguments, the dialogues, and the server's limits once known."""

    http_class: ClassVar[str]  # name of the client in httpx

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_seconds: float = 60.0
    ) -> None:
        """url: the server's root. timeout_seconds: of one request, with all its attempts."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the server's URL must begin with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            if not is_valid_api_key(api_key):
                raise ConfigError(f"api_key must be {API_KEY_RULE}")  # without showing the key
            headers["Authorization"] = f"Bearer {api_key}"
        self._dialogues = ScoreDialogues(self.url, api_key is not None, timeout_seconds)
        self._server_info: ServerInfo | None = None
        self._httpx = import_httpx()
        new_http_client = getattr(self._httpx, self.http_class)
        self._http = new_http_client(base_url=self.url, headers=headers)

    @classmethod
    def from_environment(cls, url: str = DEFAULT_URL, *, timeout_seconds: float = 60.0) -> Self:
        """Creates a client with the API key of the environment variable SELECTMOE_API_KEY."""
        api_key = os.environ.get(API_KEY_VARIABLE) or None
        return cls(url, api_key=api_key, timeout_seconds=timeout_seconds)

    def _info(self) -> Dialogue[ServerInfo]:
        if self._server_info is None:
            self._server_info = yield from self._dialogues.info()
        return self._server_info

    def _score(self, sample: Sample | Mapping[str, Any], detail: Detail) -> Dialogue[ScoreResult]:
        [batch] = encode_batches([sample], detail=detail)
        [result] = yield from self._dialogues.score(batch)
        if isinstance(result, ScoreFailure):
            raise ScoreRejectedError(result.error, error_type=result.error_type)
        return result

    def _batches(
        self, samples: Sequence[Sample | Mapping[str, Any]], detail: Detail, batching: Batching
    ) -> Dialogue[list[EncodedBatch]]:
        if not samples:
            return []
        info = yield from self._info()
        return list(
            encode_batches(
                samples,
                detail=detail,
                batching=batching,
                max_samples=info.max_samples,
                max_body_bytes=info.max_body_bytes,
            )
        )

    def _http_arguments(self, request: Request) -> dict[str, Any]:
        left = request.timeout_seconds
        return {
            "method": request.method,
            "url": request.path,
            "content": request.body,
            "timeout": self._httpx.Timeout(left, connect=min(CONNECT_TIMEOUT_SECONDS, left)),
        }


class ScoreClient(_Client):
    """Scores samples on a server; reuses its connections, and is safe to share between threads."""

    http_class = "Client"

    def info(self) -> ServerInfo:
        """The server's model and limits; requested once."""
        return self._run(self._info())

    def score(
        self, sample: Sample | Mapping[str, Any], *, detail: Detail = "sample"
    ) -> ScoreResult:
        """Scores one sample. Raises ScoreRejectedError if the server has no score for it."""
        return self._run(self._score(sample, detail))

    def score_many(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        *,
        detail: Detail = "sample",
        batching: Batching = "shared",
    ) -> list[ScoreResult | ScoreFailure]:
        """Scores a list of samples, split into requests by the server's limits; keeps their order.

        batching: "own" never batches the samples of a request with those of others. Scores are then
        reproducible to the last digit; short lists take longer.
        """
        batches = self._run(self._batches(samples, detail, batching))
        return [result for batch in batches for result in self._run(self._dialogues.score(batch))]

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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
            return answer_of(self._http.request(**self._http_arguments(step)))
        except self._httpx.TransportError as error:
            return no_answer(error)


class AsyncScoreClient(_Client):
    """ScoreClient for asyncio; a split list has up to `max_in_flight` concurrent requests."""

    http_class = "AsyncClient"

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

    async def info(self) -> ServerInfo:
        """The server's model and limits; requested once."""
        return await self._run(self._info())

    async def score(
        self, sample: Sample | Mapping[str, Any], *, detail: Detail = "sample"
    ) -> ScoreResult:
        """Scores one sample. Raises ScoreRejectedError if the server has no score for it."""
        return await self._run(self._score(sample, detail))

    async def score_many(
        self,
        samples: Sequence[Sample | Mapping[str, Any]],
        *,
        detail: Detail = "sample",
        batching: Batching = "shared",
    ) -> list[ScoreResult | ScoreFailure]:
        """Scores a list of samples, in their order; see ScoreClient.score_many."""
        batches = await self._run(self._batches(samples, detail, batching))
        free = asyncio.Semaphore(self.max_in_flight)

        async def results_of(batch: EncodedBatch) -> list[ScoreResult | ScoreFailure]:
            async with free:
                return await self._run(self._dialogues.score(batch))

        try:
            # The first failure cancels the other requests: nobody would read their scores.
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(results_of(batch)) for batch in batches]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [result for task in tasks for result in task.result()]

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
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
            return answer_of(await self._http.request(**self._http_arguments(step)))
        except self._httpx.TransportError as error:
            return no_answer(error)


def answer_of(response: "httpx.Response") -> Answer:
    return Answer(response.status_code, response.content, response.headers.get("Retry-After"))


def no_answer(error: "httpx.TransportError") -> NoAnswer:
    return NoAnswer(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def import_httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise ConfigError(
            "selectmoe.client needs httpx, the extra 'client': pip install 'selectmoe[client]'"
        ) from error
    return httpx
