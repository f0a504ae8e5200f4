"""Requests in, answers out, between the web app and the scorers: tokenises, queues, reports."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pack_samples, pad_samples
from selectmoe.records import Sample, ScoredSample, ScoredTokens, TokenizedSample, UnscoredSample
from selectmoe.scoring.calibration import DECIMALS, Calibration
from serve.batching import BatchAnswer, Batcher, BatchRequest, Outcome
from serve.error_responses import RequestError
from serve.metrics import MetricStore, Snapshot
from serve.model_description import ModelDescription
from serve.schemas import ParsedRequest, ParsedSample
from serve.settings import ServeSettings

ROLL_CALL_SECONDS = 1.0  # between two
ROLL_CALL_TIMEOUT_SECONDS = 5.0  # longer than a batch on a CPU, behind which the answer may wait
NUM_TOKENIZER_THREADS = 2  # a long text holds one up for a second

DRAIN_LOOK_SECONDS = 0.2
SHUTTING_DOWN = "the server is shutting down"

logger = logging.getLogger(__name__)


class Scorers(Protocol):
    """What the service needs of the scorers."""

    async def score(self, request: BatchRequest) -> BatchAnswer: ...

    async def describe(self) -> ModelDescription: ...

    async def call_the_roll(self, *, timeout_seconds: float) -> int: ...


class ScoringService:
    """One for each ingress replica. Not ready before it has seen a warm scorer."""

    def __init__(self, settings: ServeSettings, scorers: Scorers) -> None:
        self.settings = settings
        self.metrics = MetricStore()
        self.description: ModelDescription | None = None
        self.num_ready = 0  # scorers that answered the last roll call
        self._scorers = scorers
        self._threads = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._tokenizer: ChatTokenizer | None = None
        self._batcher: Batcher | None = None
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self._num_unanswered = 0  # requests

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While it is entered, batches are sent and the roll is called."""
        self._task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def check_health(self) -> None:
        """Raises where batches are no longer sent, which only a bug of ours can cause."""
        if self._has_ended():
            raise RuntimeError("the batcher has ended")

    def _has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    async def drain(self) -> None:
        """Refuses what comes, and returns when what was accepted is answered."""
        self._draining = True
        while self._num_unanswered:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        await asyncio.sleep(DRAIN_LOOK_SECONDS)  # the last answers are on their way

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Around everything that is done for one request."""
        self._num_unanswered += 1
        try:
            yield
        finally:
            self._num_unanswered -= 1

    def why_unready(self) -> str | None:
        """None when every scorer has answered the last roll call."""
        if self._draining:
            return SHUTTING_DOWN
        if self.description is None:
            return "no scorer is warm yet"
        if self._has_ended():
            return "this replica no longer sends batches, and is being replaced"
        if self.num_ready < self.settings.num_replicas:
            return (
                f"not all of {self.settings.num_replicas} scorers answer; the others start, are "
                "stuck or are being replaced"
            )
        return None

    async def score(self, request: ParsedRequest) -> dict[str, Any]:
        """The answer as JSON holds it; raises RequestError where there is none."""
        _, tokenizer, description = self._ready_parts()
        outcomes = await self._score(request)
        if not request.is_list and isinstance(outcomes[0], UnscoredSample):
            raise RequestError(_error_type(outcomes[0]), f"samples: {outcomes[0].detail}")
        results = await self._results(tokenizer, description, request, outcomes)
        return {
            "results": results,
            "model": description.model,
            "revision": description.revision,
            "calibration": calibration_info(description),
            "usage": {"tokens": sum(result.get("num_tokens", 0) for result in results)},
        }

    async def score_samples(self, samples: Sequence[Sample]) -> list[Outcome]:
        """One outcome a sample, by batches of their own: for jobs on this cluster."""
        parsed = tuple(ParsedSample(None, sample) for sample in samples)
        return await self._score(ParsedRequest(parsed, "sample", "own", is_list=True))

    async def _score(self, request: ParsedRequest) -> list[Outcome]:
        batcher, tokenizer, _ = self._ready_parts()
        with batcher.accepted(len(request.samples)):
            try:
                async with asyncio.timeout(self.settings.request_timeout_seconds):
                    tokenized = await self._tokenize(tokenizer, request)
                    outcomes = await self._outcomes(batcher, tokenized, request)
            except TimeoutError:
                seconds = self.settings.request_timeout_seconds
                raise RequestError(
                    "unavailable", f"no answer within {seconds:g} s", retry_after_seconds=1
                ) from None
        for outcome in outcomes:
            kind = _error_type(outcome) if isinstance(outcome, UnscoredSample) else "scored"
            self.metrics.count("samples_total", outcome=kind)
        return outcomes

    def require_room(self) -> None:
        """Raises RequestError where a request would be refused however small: before it is read."""
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

    def _ready_parts(self) -> tuple[Batcher, ChatTokenizer, ModelDescription]:
        if self._batcher is None or self._tokenizer is None or self.description is None:
            raise RequestError("unavailable", "no scorer is warm yet", retry_after_seconds=2)
        return self._batcher, self._tokenizer, self.description

    async def _tokenize(
        self, tokenizer: ChatTokenizer, request: ParsedRequest
    ) -> list[TokenizedSample | UnscoredSample]:
        samples = [parsed.sample for parsed in request.samples if parsed.sample is not None]
        loop = asyncio.get_running_loop()
        tokenized = iter(
            await loop.run_in_executor(self._threads, tokenizer.tokenize_each, samples)
        )
        return [
            next(tokenized)
            if parsed.sample is not None
            else UnscoredSample("", "validation", parsed.error)
            for parsed in request.samples
        ]

    async def _outcomes(
        self,
        batcher: Batcher,
        tokenized: Sequence[TokenizedSample | UnscoredSample],
        request: ParsedRequest,
    ) -> list[Outcome]:
        good = [entry for entry in tokenized if isinstance(entry, TokenizedSample)]
        with_tokens = request.detail == "tokens"
        scored = iter(await batcher.score(good, with_tokens=with_tokens, batching=request.batching))
        return [entry if isinstance(entry, UnscoredSample) else next(scored) for entry in tokenized]

    async def _results(
        self,
        tokenizer: ChatTokenizer,
        description: ModelDescription,
        request: ParsedRequest,
        outcomes: Sequence[Outcome],
    ) -> list[dict[str, Any]]:
        results = []
        percentiles = iter(_percentiles(description.calibration, outcomes))
        for parsed, outcome in zip(request.samples, outcomes, strict=True):
            if isinstance(outcome, UnscoredSample):
                results.append(
                    {
                        "id": parsed.wire_id,
                        "error": outcome.detail,
                        "error_type": _error_type(outcome),
                        "reason": outcome.reason,
                    }
                )
                continue
            scored = _sample_of(outcome)
            result = _scored_result(parsed, scored, next(percentiles))
            if request.detail == "layers":
                result["layers"] = scored.layer_scores.tolist()
            if isinstance(outcome, ScoredTokens):
                result["tokens"] = await self._token_results(tokenizer, parsed, outcome)
            results.append(result)
        return results

    async def _token_results(
        self, tokenizer: ChatTokenizer, parsed: ParsedSample, scored: ScoredTokens
    ) -> list[dict[str, Any]]:
        assert parsed.sample is not None
        loop = asyncio.get_running_loop()
        texts = await loop.run_in_executor(self._threads, tokenizer.token_texts, parsed.sample)
        return [
            {
                "text": token.text,
                "start": token.start,
                "end": token.end,
                "is_answer": token.is_answer,
                "score": score,
            }
            for token, score in zip(texts, scored.token_scores.tolist(), strict=True)
        ]

    async def _run(self) -> None:
        description = await self._scorers.describe()
        loop = asyncio.get_running_loop()
        self._tokenizer = await loop.run_in_executor(
            self._threads, _load_tokenizer, description, self.settings.model
        )
        self._batcher = Batcher(
            self._scorers.score,
            max_batch_tokens=description.max_batch_tokens,
            max_wait_seconds=self.settings.max_wait_milliseconds / 1_000,
            max_queued_samples=self.settings.max_queued_samples,
            packer=pack_samples if description.rows_end_to_end else pad_samples,
            observer=self.metrics,
        )
        self.description = description
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._batcher.run())
            tasks.create_task(self._watch(self._batcher))

    async def _watch(self, batcher: Batcher) -> None:
        while True:
            self.num_ready = await self._scorers.call_the_roll(
                timeout_seconds=ROLL_CALL_TIMEOUT_SECONDS
            )
            # Not less than there should be: a stuck scorer keeps its share of the batches until it
            # is replaced, and the others go on with theirs.
            batcher.set_num_replicas(max(self.num_ready, self.settings.num_replicas))
            await asyncio.sleep(ROLL_CALL_SECONDS)


def calibration_info(description: ModelDescription) -> dict[str, Any] | None:
    calibration = description.calibration
    if calibration is None:
        return None
    return {
        "formula": calibration.formula,
        "num_samples": calibration.num_samples,
        "weights_hash": calibration.weights_hash,
    }


def _percentiles(
    calibration: Calibration | None, outcomes: Sequence[Outcome]
) -> Sequence[float | None]:
    """One for each outcome with a score, by one look at the quantiles for all of them."""
    scores = [
        _sample_of(outcome).score for outcome in outcomes if not isinstance(outcome, UnscoredSample)
    ]
    return [None] * len(scores) if calibration is None else calibration.percentiles(scores).tolist()


def _sample_of(outcome: ScoredSample | ScoredTokens) -> ScoredSample:
    return outcome.sample if isinstance(outcome, ScoredTokens) else outcome


def _scored_result(
    parsed: ParsedSample, scored: ScoredSample, percentile: float | None
) -> dict[str, Any]:
    return {
        "id": parsed.wire_id,
        "score": scored.score,
        "percentile": percentile,
        "keep_at_pct": None if percentile is None else round(100 - percentile, DECIMALS),
        "num_tokens": scored.num_tokens,
        "num_answer_tokens": scored.num_answer_tokens,
        "truncated": scored.truncated,
    }


def _error_type(outcome: UnscoredSample) -> str:
    """A sample is at fault where the chat template refuses it, else the model is."""
    return "validation" if outcome.reason in ("validation", "chat_template") else "internal"


def _load_tokenizer(description: ModelDescription, model: str) -> ChatTokenizer:
    from transformers import AutoTokenizer

    from selectmoe.model.quiet_loading import quiet_transformers
    from selectmoe.model.registration import register_select_moe

    register_select_moe()
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(model)
    return ChatTokenizer(tokenizer, max_sequence_length=description.max_sequence_length)
