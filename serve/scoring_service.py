"""Scores requests: tokenizes samples, queues them for the scorers and builds the response."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Protocol, TypeVar

from selectmoe.client.wire import SampleErrorType
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pack_samples, pad_samples
from selectmoe.records import Sample, ScoredSample, ScoredTokens, TokenizedSample, UnscoredSample
from selectmoe.scoring.calibration import Calibration
from serve.batching import BatchAnswer, Batcher, BatchRequest, Outcome
from serve.error_responses import RequestError
from serve.metrics import MetricStore, Snapshot
from serve.model_description import ModelDescription
from serve.request_parsing import ParsedRequest, ParsedSample
from serve.schemas import (
    CalibrationInfo,
    SampleError,
    SampleResult,
    ScoreOptions,
    ScoreResponse,
    TokenResult,
    Usage,
)
from serve.settings import ServeSettings

HEALTH_CHECK_SECONDS = 1.0  # wait between two health checks
HEALTH_CHECK_TIMEOUT_SECONDS = 5.0  # longer than a batch on a CPU, which may delay the answer
NUM_TOKENIZER_THREADS = 2
# Requests with more characters, which may take seconds, are tokenized one by one on a thread of
# their own: short ones do not wait for them.
LONG_REQUEST_CHARACTERS = 100_000
DRAIN_POLL_SECONDS = 0.2
MODEL_FAILURES = ("internal", "score_not_finite")  # reasons; all others are a sample's own
SHUTTING_DOWN = "the server is shutting down"

T = TypeVar("T")


class Scorers(Protocol):
    """The scorer replicas."""

    async def score(self, request: BatchRequest) -> BatchAnswer: ...

    async def describe(self) -> ModelDescription: ...

    async def count_healthy(self, *, timeout_seconds: float) -> int: ...


class ScoringService:
    """One in each ingress replica; not ready until a scorer is warm."""

    def __init__(self, settings: ServeSettings, scorers: Scorers) -> None:
        self.settings = settings
        self.metrics = MetricStore()
        self.description: ModelDescription | None = None
        self.num_ready = 0  # scorers that passed the last health check
        self._scorers = scorers
        self._threads = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._long_thread = ThreadPoolExecutor(1, thread_name_prefix="long-tokenizer")
        self._tokenizer: ChatTokenizer | None = None
        self._batcher: Batcher | None = None
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self._num_unanswered = 0  # requests

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sends batches and checks the scorers' health inside this context."""
        self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def check_health(self) -> None:
        """Raises if batches are no longer sent, which only a bug of ours can cause."""
        if self._has_ended():
            raise RuntimeError("the batcher has ended")

    def _has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    async def drain(self) -> None:
        """Refuses new requests, and returns when all accepted ones are answered."""
        self._draining = True
        while self._num_unanswered:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        await asyncio.sleep(DRAIN_POLL_SECONDS)  # the last responses are being sent

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts a request as unanswered inside this context."""
        self._num_unanswered += 1
        try:
            yield
        finally:
            self._num_unanswered -= 1

    def why_unready(self) -> str | None:
        """None if every scorer passed the last health check."""
        if self._draining:
            return SHUTTING_DOWN
        if self.description is None:
            return "no scorer is warm yet"
        if self._has_ended():
            return "this replica no longer sends batches, and is being replaced"
        if self.num_ready < self.settings.num_replicas:
            return (
                f"only {self.num_ready} of {self.settings.num_replicas} scorers are healthy; the "
                "others are starting, stuck or being replaced"
            )
        return None

    async def score(self, request: ParsedRequest) -> ScoreResponse:
        """Raises RequestError if the request has no scores."""
        _, tokenizer, description = self.warm_parts()
        outcomes = await self._score(request)
        if not request.is_list and isinstance(outcomes[0], UnscoredSample):
            raise RequestError(_error_type(outcomes[0]), f"samples: {outcomes[0].detail}")
        calibration = description.calibration
        results = await self._results(tokenizer, calibration, request, outcomes)
        num_tokens = sum(entry.num_tokens for entry in results if isinstance(entry, SampleResult))
        return ScoreResponse(
            results=results,
            model=description.model,
            revision=description.revision,
            calibration=None
            if calibration is None
            else CalibrationInfo.model_validate(calibration, from_attributes=True),
            usage=Usage(tokens=num_tokens),
        )

    async def score_samples(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome for each sample, in batches of their own: for jobs on this cluster."""
        parsed = tuple(ParsedSample(None, sample) for sample in samples)
        return await self._score(ParsedRequest(parsed, ScoreOptions(batching="own"), is_list=True))

    async def _score(self, request: ParsedRequest) -> list[Outcome]:
        batcher, tokenizer, _ = self.warm_parts()
        with batcher.accepted(len(request.samples)):
            try:
                async with asyncio.timeout(self.settings.request_timeout_seconds):
                    outcomes = await self._outcomes(batcher, tokenizer, request)
            except TimeoutError:
                seconds = self.settings.request_timeout_seconds
                raise RequestError(
                    "unavailable", f"no answer within {seconds:g} s", retry_after_seconds=1
                ) from None
        for outcome in outcomes:
            label = _error_type(outcome) if isinstance(outcome, UnscoredSample) else "scored"
            self.metrics.count("samples_total", outcome=label)
        return outcomes

    def require_room(self) -> None:
        """Raises RequestError if any request would be refused; called before its body is read."""
        if self._draining:
            raise RequestError("unavailable", SHUTTING_DOWN, retry_after_seconds=5)
        if self._batcher is not None:
            with self._batcher.accepted(0):
                pass

    def metrics_snapshot(self) -> Snapshot:
        batcher = self._batcher
        self.metrics.set_gauge("queue_samples", batcher.num_waiting if batcher else 0)
        self.metrics.set_gauge("accepted_samples", batcher.num_accepted if batcher else 0)
        self.metrics.set_gauge("scorers_ready", self.num_ready)
        return self.metrics.snapshot()

    def warm_parts(self) -> tuple[Batcher, ChatTokenizer, ModelDescription]:
        """Raises RequestError until a scorer is warm."""
        if self._batcher is None or self._tokenizer is None or self.description is None:
            raise RequestError("unavailable", "no scorer is warm yet", retry_after_seconds=2)
        return self._batcher, self._tokenizer, self.description

    async def _outcomes(
        self, batcher: Batcher, tokenizer: ChatTokenizer, request: ParsedRequest
    ) -> list[Outcome]:
        parsed = [entry.sample for entry in request.samples]
        samples = [entry for entry in parsed if isinstance(entry, Sample)]
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(
            self._threads_for(samples), tokenizer.tokenize_to_score, samples
        )
        tokenized = _merge(parsed, outcomes)
        scored = await batcher.score(
            [entry for entry in tokenized if isinstance(entry, TokenizedSample)],
            with_tokens=request.options.detail == "tokens",
            batching=request.options.batching,
        )
        return _merge(tokenized, scored)

    def _threads_for(self, samples: Sequence[Sample]) -> ThreadPoolExecutor:
        num_characters = sum(len(text) for sample in samples for text in sample.texts())
        return self._long_thread if num_characters > LONG_REQUEST_CHARACTERS else self._threads

    async def _results(
        self,
        tokenizer: ChatTokenizer,
        calibration: Calibration | None,
        request: ParsedRequest,
        outcomes: Sequence[Outcome],
    ) -> list[SampleResult | SampleError]:
        loop = asyncio.get_running_loop()
        results: list[SampleResult | SampleError] = []
        percentiles = iter(_percentiles(calibration, outcomes))
        for parsed, outcome in zip(request.samples, outcomes, strict=True):
            if isinstance(outcome, UnscoredSample):
                results.append(_sample_error(parsed, outcome))
                continue
            scored = _sample_of(outcome)
            result = _sample_result(parsed, scored, next(percentiles))
            if request.options.detail == "layers":
                result.layers = scored.layer_scores.tolist()
            if isinstance(outcome, ScoredTokens):
                assert isinstance(parsed.sample, Sample)
                result.tokens = await loop.run_in_executor(
                    self._threads_for([parsed.sample]), _token_results, tokenizer, parsed, outcome
                )
            results.append(result)
        return results

    async def _run(self) -> None:
        description = await self._scorers.describe()
        loop = asyncio.get_running_loop()
        self._tokenizer = await loop.run_in_executor(
            self._threads, _load_tokenizer, description, self.settings
        )
        self._batcher = Batcher(
            self._scorers.score,
            max_tokens_per_batch=description.max_tokens_per_batch,
            max_wait_seconds=self.settings.max_wait_milliseconds / 1_000,
            max_queued_samples=self.settings.max_queued_samples,
            packer=pack_samples if description.is_packed else pad_samples,
            metrics=self.metrics,
        )
        self.description = description
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._batcher.run())
            tasks.create_task(self._watch(self._batcher))

    async def _watch(self, batcher: Batcher) -> None:
        while True:
            self.num_ready = await self._scorers.count_healthy(
                timeout_seconds=HEALTH_CHECK_TIMEOUT_SECONDS
            )
            # At least num_replicas: a stuck scorer keeps the batches that it was sent until it is
            # replaced, and the other scorers must still get their own.
            batcher.set_num_replicas(max(self.num_ready, self.settings.num_replicas))
            await asyncio.sleep(HEALTH_CHECK_SECONDS)


def _merge(entries: Sequence[object], outcomes: Sequence[T]) -> list[T | UnscoredSample]:
    """Replaces each entry by the next outcome, except those that are unscored already."""
    remaining = iter(outcomes)
    return [entry if isinstance(entry, UnscoredSample) else next(remaining) for entry in entries]


def _percentiles(
    calibration: Calibration | None, outcomes: Sequence[Outcome]
) -> Sequence[float | None]:
    """One percentile for each outcome that has a score."""
    scores = [
        _sample_of(outcome).score for outcome in outcomes if not isinstance(outcome, UnscoredSample)
    ]
    return [None] * len(scores) if calibration is None else calibration.percentiles(scores).tolist()


def _sample_of(outcome: ScoredSample | ScoredTokens) -> ScoredSample:
    return outcome.sample if isinstance(outcome, ScoredTokens) else outcome


def _sample_result(
    parsed: ParsedSample, scored: ScoredSample, percentile: float | None
) -> SampleResult:
    return SampleResult(
        id=parsed.wire_id,
        score=scored.score,
        percentile=percentile,
        num_tokens=scored.num_tokens,
        num_answer_tokens=scored.num_answer_tokens,
        truncated=scored.truncated,
    )


def _sample_error(parsed: ParsedSample, outcome: UnscoredSample) -> SampleError:
    return SampleError(
        id=parsed.wire_id,
        error=outcome.detail,
        error_type=_error_type(outcome),
        reason=outcome.reason,
    )


def _token_results(
    tokenizer: ChatTokenizer, parsed: ParsedSample, scored: ScoredTokens
) -> list[TokenResult]:
    assert isinstance(parsed.sample, Sample)
    texts = tokenizer.token_texts(parsed.sample)
    return [
        TokenResult(**asdict(token), score=score)
        for token, score in zip(texts, scored.token_scores.tolist(), strict=True)
    ]


def _error_type(outcome: UnscoredSample) -> SampleErrorType:
    """internal where the model failed, validation where the sample itself is refused."""
    return "internal" if outcome.reason in MODEL_FAILURES else "validation"


def _load_tokenizer(description: ModelDescription, settings: ServeSettings) -> ChatTokenizer:
    from selectmoe.model.selector_files import find_selector
    from selectmoe.model.selector_tokenizer import load_selector_tokenizer

    files = find_selector(settings.model, settings.model_checkpoint_path)
    return ChatTokenizer(
        load_selector_tokenizer(files),
        max_sequence_length=description.max_sequence_length,
        turns=description.turns,
    )
