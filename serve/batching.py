"""The queue of samples, which batches those of many requests for the next free scorer.

Batches are made where requests arrive and not where they are scored: a queued sample can still join
a batch, or leave when its client disconnects, and one call of a scorer serves many requests. This
module does not use Ray: `send` scores one batch.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from selectmoe.data.packing import pad_samples
from selectmoe.records import (
    PackedBatch,
    PaddedBatch,
    ScoredSample,
    ScoredTokens,
    TokenizedSample,
    UnscoredSample,
)
from serve.error_responses import RequestError
from serve.metrics import MetricStore

Outcome = ScoredSample | ScoredTokens | UnscoredSample
CALLS_PER_REPLICA = 2  # one batch is scored while the next one is being sent
MAX_ATTEMPTS = 3
MAX_RETRY_AFTER_SECONDS = 30


class ScorerLostError(Exception):
    """The batch has no answer because its replica died or is stuck; it can be sent again."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A batch for a scorer."""

    samples: tuple[TokenizedSample, ...]
    with_tokens: tuple[bool, ...]  # for each sample, whether to score its tokens too
    in_one_pass: bool = False  # score it in a single forward pass, not repacked


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """One outcome for each sample, and the time of the model."""

    outcomes: tuple[Outcome, ...]
    seconds: float


@dataclass(slots=True, eq=False)
class _Waiting:
    """One sample in the queue; `answer` is cancelled when its client disconnects."""

    sample: TokenizedSample
    with_tokens: bool
    answer: asyncio.Future[Outcome]
    own_batch: object | None = None  # with batching="own": equal for the samples of one batch
    arrived: float = field(default_factory=time.monotonic)
    num_failures: int = 0


class Batcher:
    """Belongs to one event loop; `run` sends batches until it is cancelled."""

    def __init__(
        self,
        send: Callable[[BatchRequest], Awaitable[BatchAnswer]],
        *,
        max_tokens_per_batch: int,
        max_wait_seconds: float,
        max_queued_samples: int,
        packer: Callable[..., Iterator[PaddedBatch] | Iterator[PackedBatch]] = pad_samples,
        metrics: MetricStore | None = None,
    ) -> None:
        """packer: the function with which the select job makes its batches, on the scorers."""
        self.send = send
        self.max_tokens_per_batch = max_tokens_per_batch
        self.max_wait_seconds = max_wait_seconds
        self.max_queued_samples = max_queued_samples
        self.packer = packer
        self.metrics = metrics or MetricStore()
        self.num_replicas = 1
        self.num_accepted = 0  # samples accepted and not yet answered
        self.num_in_flight = 0  # batches
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._samples_per_second = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def set_num_replicas(self, num_replicas: int) -> None:
        """Sets the number of scorers; each has at most two batches in flight."""
        self.num_replicas = num_replicas
        self._changed.set()

    @contextlib.contextmanager
    def accepted(self, num_samples: int) -> Iterator[None]:
        """Counts the samples as accepted inside this context; raises RequestError if it is full.

        The request's own size does not count: a full queue refuses a list and a single sample
        alike.
        """
        if self.num_accepted >= self.max_queued_samples:
            raise RequestError(
                "overloaded",
                f"the queue is full ({self.num_accepted:,} samples); try again later",
                retry_after_seconds=self._retry_after_seconds(),
            )
        self.num_accepted += num_samples
        try:
            yield
        finally:
            self.num_accepted -= num_samples

    async def score(
        self, samples: Sequence[TokenizedSample], *, with_tokens: bool, batching: str = "shared"
    ) -> list[Outcome]:
        """One outcome for each sample, in order; cancelling the caller removes them from the queue.

        batching: "own" makes the same batches of these samples as the select job, without samples
        of other requests. A score depends on the rest of its batch in the last digit.
        Raises RequestError("unavailable") if no scorer answered.
        """
        loop = asyncio.get_running_loop()
        entries = [_Waiting(sample, with_tokens, loop.create_future()) for sample in samples]
        self._waiting.extend(entries if batching == "shared" else self._in_own_batches(entries))
        self._changed.set()
        try:
            return await asyncio.gather(*(entry.answer for entry in entries))
        except BaseException:  # usually CancelledError, because the client disconnected
            self._remove(entries)
            raise

    def _remove(self, entries: Sequence[_Waiting]) -> None:
        for entry in entries:
            entry.answer.cancel()
        self._waiting = deque(entry for entry in self._waiting if not entry.answer.done())

    def _in_own_batches(self, entries: Sequence[_Waiting]) -> Iterator[_Waiting]:
        samples = [entry.sample for entry in entries]
        for batch in self.packer(samples, max_tokens_per_batch=self.max_tokens_per_batch):
            own_batch = object()
            for position in batch.positions:
                entries[position].own_batch = own_batch
                yield entries[position]

    async def run(self) -> None:
        """Sends a batch whenever a scorer can take one."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (seconds := self._seconds_until_next()) is not None:
                if seconds > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), seconds)
                    self._changed.clear()
                    continue
                self._start(self._take_batch())

    def _seconds_until_next(self) -> float | None:
        """How long the next batch waits for more samples; None if nothing can be sent now."""
        if not self._waiting or self.num_in_flight >= CALLS_PER_REPLICA * self.num_replicas:
            return None
        if self.num_in_flight < self.num_replicas:
            return 0.0
        queued = 0
        for entry in self._waiting:
            queued += len(entry.sample.token_ids)
            if queued >= self.max_tokens_per_batch:
                return 0.0
        return self._waiting[0].arrived + self.max_wait_seconds - time.monotonic()

    def _take_batch(self) -> list[_Waiting]:
        """The oldest samples within the token limit, at least one.

        A sample whose scorer was lost is sent alone: if it is the cause, no other sample suffers.
        """
        batch: list[_Waiting] = []
        num_tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            num_tokens += len(entry.sample.token_ids)
            alone = entry.num_failures > 0 and entry.own_batch is None
            is_other = bool(batch) and entry.own_batch is not batch[0].own_batch
            if batch and (alone or is_other or num_tokens > self.max_tokens_per_batch):
                break
            batch.append(self._waiting.popleft())
            if alone:
                break
        return batch

    def _start(self, batch: list[_Waiting]) -> None:
        self.num_in_flight += 1
        call = asyncio.create_task(self._answer(batch))
        self._calls.add(call)  # the event loop keeps only weak references to tasks
        call.add_done_callback(self._finish)

    def _finish(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self.num_in_flight -= 1
        self._changed.set()

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            await self._score_batch(batch)
        except ScorerLostError:
            self.metrics.count("batches_lost_total")
            self._requeue(batch)
        except Exception as error:
            # A bug of ours: without this, the callers would wait until their requests time out.
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)

    async def _score_batch(self, batch: list[_Waiting]) -> None:
        num_tokens = sum(len(entry.sample.token_ids) for entry in batch)
        now = time.monotonic()
        self.metrics.observe("batch_samples", len(batch))
        self.metrics.observe("batch_tokens", num_tokens)
        for entry in batch:
            self.metrics.observe("queue_wait_seconds", now - entry.arrived)
        request = BatchRequest(
            tuple(entry.sample for entry in batch),
            tuple(entry.with_tokens for entry in batch),
            in_one_pass=batch[0].own_batch is not None,
        )
        answer = await self.send(request)
        self._update_speed(len(batch), time.monotonic() - now)
        self.metrics.observe("batch_seconds", answer.seconds)
        self.metrics.count("tokens_total", num_tokens)
        for entry, outcome in zip(batch, answer.outcomes, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(outcome)

    def _requeue(self, batch: list[_Waiting]) -> None:
        """Puts samples back at the front, in order; after MAX_ATTEMPTS they fail."""
        for entry in reversed(batch):
            entry.num_failures += 1
            if entry.answer.done():
                continue
            if entry.num_failures < MAX_ATTEMPTS:
                self._waiting.appendleft(entry)
            else:
                entry.answer.set_exception(
                    RequestError(
                        "unavailable", "no scorer could answer; try again", retry_after_seconds=1
                    )
                )

    def _update_speed(self, num_samples: int, seconds: float) -> None:
        speed = num_samples / max(seconds, 1e-3)
        self._samples_per_second += 0.1 * (speed - self._samples_per_second)

    def _retry_after_seconds(self) -> int:
        """Time in which half of the queue is scored, at the moving average of the speed."""
        speed = max(self._samples_per_second * self.num_replicas, 1e-3)
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.num_accepted / 2 / speed)))
