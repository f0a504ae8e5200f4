"""Samples of many requests wait here and leave in batches, for whichever scorer is free.

Batches are made where requests arrive and not where they are scored: a sample that waits can still
leave with others, or not at all when its client is gone, and one call of a scorer serves many
requests. This file knows no Ray: it is given `send`, which scores one batch somewhere.
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

Outcome = ScoredSample | ScoredTokens | UnscoredSample
CALLS_PER_REPLICA = 2  # one is scored while the next one is already on its way
MAX_ATTEMPTS = 3
MAX_RETRY_AFTER_SECONDS = 30


class ScorerLostError(Exception):
    """The batch has no answer since its replica died or is stuck; another one may have it."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a scorer is sent."""

    samples: tuple[TokenizedSample, ...]
    with_tokens: tuple[bool, ...]  # whose scores of single tokens are wanted
    is_rectangle: bool = False  # to be scored in one forward pass, as it is


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What comes back: one outcome a sample, and how long the model took."""

    outcomes: tuple[Outcome, ...]
    seconds: float


@dataclass(slots=True, eq=False)
class _Waiting:
    """One sample in the queue; its client is gone when `answer` is cancelled."""

    sample: TokenizedSample
    with_tokens: bool
    answer: asyncio.Future[Outcome]
    rectangle: object | None = None  # the batch of its request's own that it belongs to
    arrived: float = field(default_factory=time.monotonic)
    num_failures: int = 0


class BatchObserver:
    """Told of what happens, for metrics; this one does not care."""

    def batch_sent(self, *, num_samples: int, num_tokens: int, waits: Sequence[float]) -> None: ...

    def batch_scored(self, *, num_samples: int, num_tokens: int, seconds: float) -> None: ...

    def batch_lost(self) -> None: ...


class Batcher:
    """Owned by one event loop; `run` sends batches until it is cancelled."""

    def __init__(
        self,
        send: Callable[[BatchRequest], Awaitable[BatchAnswer]],
        *,
        max_batch_tokens: int,
        max_wait_seconds: float,
        max_queued_samples: int,
        packer: Callable[..., Iterator[PaddedBatch] | Iterator[PackedBatch]] = pad_samples,
        observer: BatchObserver | None = None,
    ) -> None:
        """packer: the scorers', which makes the batches of the select job."""
        self.send = send
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_seconds = max_wait_seconds
        self.max_queued_samples = max_queued_samples
        self.packer = packer
        self.observer = observer or BatchObserver()
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
        """How many scorers there are now; each is sent two batches at a time."""
        self.num_replicas = num_replicas
        self._changed.set()

    @contextlib.contextmanager
    def accepted(self, num_samples: int) -> Iterator[None]:
        """Holds the samples' place in the queue; raises RequestError where it is full.

        Only what is there already counts, not the request's own size: a long list is refused at
        the same moment as a single sample.
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
        """One outcome a sample, in order; when the caller is cancelled, they leave the queue.

        batching: "own" makes the batches that the select job makes of these samples, and lets no
        others into them. A score depends on its batch mates in the last digit.
        Raises RequestError("unavailable") where no scorer answered.
        """
        loop = asyncio.get_running_loop()
        entries = [_Waiting(sample, with_tokens, loop.create_future()) for sample in samples]
        self._waiting.extend(entries if batching == "shared" else self._in_rectangles(entries))
        self._changed.set()
        try:
            return await asyncio.gather(*(entry.answer for entry in entries))
        except BaseException:  # of which a client that has gone is the usual one
            self._leave(entries)
            raise

    def _leave(self, entries: Sequence[_Waiting]) -> None:
        for entry in entries:
            entry.answer.cancel()
        self._waiting = deque(entry for entry in self._waiting if not entry.answer.done())

    def _in_rectangles(self, entries: Sequence[_Waiting]) -> Iterator[_Waiting]:
        samples = [entry.sample for entry in entries]
        for batch in self.packer(samples, max_tokens_per_batch=self.max_batch_tokens):
            rectangle = object()
            for position in batch.positions:
                entries[position].rectangle = rectangle
                yield entries[position]

    async def run(self) -> None:
        """Sends batches as scorers are free for them."""
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
        """How long the next batch waits for company; None: nothing can be sent now."""
        if not self._waiting or self.num_in_flight >= CALLS_PER_REPLICA * self.num_replicas:
            return None
        if self.num_in_flight < self.num_replicas:
            return 0.0
        queued = 0
        for entry in self._waiting:
            queued += len(entry.sample.token_ids)
            if queued >= self.max_batch_tokens:
                return 0.0
        return self._waiting[0].arrived + self.max_wait_seconds - time.monotonic()

    def _take_batch(self) -> list[_Waiting]:
        """The longest waiting samples that the token budget holds, at least one.

        A sample whose scorer was lost travels alone: were it the reason, it takes no others along.
        """
        batch: list[_Waiting] = []
        num_tokens = 0
        while self._waiting:
            entry = self._waiting[0]
            num_tokens += len(entry.sample.token_ids)
            alone = entry.num_failures > 0 and entry.rectangle is None
            is_other = bool(batch) and entry.rectangle is not batch[0].rectangle
            if batch and (alone or is_other or num_tokens > self.max_batch_tokens):
                break
            batch.append(self._waiting.popleft())
            if alone:
                break
        return batch

    def _start(self, batch: list[_Waiting]) -> None:
        self.num_in_flight += 1
        call = asyncio.create_task(self._answer(batch))
        self._calls.add(call)  # the loop itself holds tasks only weakly
        call.add_done_callback(self._finish)

    def _finish(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self.num_in_flight -= 1
        self._changed.set()

    async def _answer(self, batch: list[_Waiting]) -> None:
        try:
            await self._score_batch(batch)
        except ScorerLostError:
            self.observer.batch_lost()
            self._try_again(batch)
        except Exception as error:
            # A bug of ours: heard of by who asked, who would wait for nothing otherwise.
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)

    async def _score_batch(self, batch: list[_Waiting]) -> None:
        num_tokens = sum(len(entry.sample.token_ids) for entry in batch)
        now = time.monotonic()
        self.observer.batch_sent(
            num_samples=len(batch),
            num_tokens=num_tokens,
            waits=[now - entry.arrived for entry in batch],
        )
        request = BatchRequest(
            tuple(entry.sample for entry in batch),
            tuple(entry.with_tokens for entry in batch),
            is_rectangle=batch[0].rectangle is not None,
        )
        answer = await self.send(request)
        self._note_speed(len(batch), time.monotonic() - now)
        self.observer.batch_scored(
            num_samples=len(batch), num_tokens=num_tokens, seconds=answer.seconds
        )
        for entry, outcome in zip(batch, answer.outcomes, strict=True):
            if not entry.answer.done():
                entry.answer.set_result(outcome)

    def _try_again(self, batch: list[_Waiting]) -> None:
        """Back to the front, in order; samples that had their chances fail."""
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

    def _note_speed(self, num_samples: int, seconds: float) -> None:
        speed = num_samples / max(seconds, 1e-3)
        self._samples_per_second += 0.1 * (speed - self._samples_per_second)

    def _retry_after_seconds(self) -> int:
        """When half of the queue will be done, at the speed of late."""
        speed = max(self._samples_per_second * self.num_replicas, 1e-3)
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.num_accepted / 2 / speed)))
