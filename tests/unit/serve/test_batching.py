"""Samples leave the queue in batches under a token budget, in order, and never twice."""

import asyncio

import numpy as np
import pytest

from selectmoe.records import ScoredSample, TokenizedSample
from serve.batching import MAX_ATTEMPTS, BatchAnswer, Batcher, ScorerLostError
from serve.error_responses import RequestError
from serve.metrics import MetricStore


def sample(name, num_tokens=10):
    tokens = np.zeros(num_tokens, dtype=np.int32)
    return TokenizedSample(name, tokens, tokens == 0, truncated=False)


class Scorer:
    """Answers a batch when it is told to; `sent` holds the names of each batch."""

    def __init__(self):
        self.sent = []
        self.free = asyncio.Event()
        self.free.set()
        self.loses = lambda names: False

    async def __call__(self, request):
        names = [entry.sample_id for entry in request.samples]
        self.sent.append(names)
        await self.free.wait()
        if self.loses(names):
            raise ScorerLostError
        outcomes = [
            ScoredSample(name, 0.5, 1, 1, False, np.zeros(1, dtype=np.float32)) for name in names
        ]
        return BatchAnswer(tuple(outcomes), 0.001)


def run(test, **settings):
    """Runs an async test(batcher, scorer) beside the batcher."""

    async def main():
        scorer = Scorer()
        batcher = Batcher(
            scorer,
            **{"max_tokens_per_batch": 40, "max_wait_seconds": 0.0, "max_queued_samples": 100}
            | settings,
        )
        running = asyncio.create_task(batcher.run())
        try:
            async with asyncio.timeout(20):
                await test(batcher, scorer)
        finally:
            running.cancel()
        assert batcher.num_waiting == 0

    asyncio.run(main())


async def ask(batcher, *names, num_tokens=10):
    outcomes = await batcher.score([sample(n, num_tokens) for n in names], with_tokens=False)
    return [outcome.sample_id for outcome in outcomes]


def test_answers_come_back_in_the_order_of_the_request():
    async def test(batcher, scorer):
        names = [str(number) for number in range(50)]
        assert await ask(batcher, *names) == names
        assert [name for batch in scorer.sent for name in batch] == names

    run(test)


def test_no_batch_is_over_the_budget_but_a_sample_that_is_longer_than_it_goes_alone():
    async def test(batcher, scorer):
        await asyncio.gather(
            ask(batcher, *"abcdefgh"), ask(batcher, "long", num_tokens=100), ask(batcher, *"ij")
        )
        assert all(len(batch) <= 4 for batch in scorer.sent)
        assert ["long"] in scorer.sent

    run(test)


def test_requests_that_arrive_while_the_scorer_is_busy_share_a_batch():
    async def test(batcher, scorer):
        scorer.free.clear()
        first = asyncio.create_task(ask(batcher, "first"))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(ask(batcher, name)) for name in "abc"]
        await asyncio.sleep(0.05)
        scorer.free.set()
        await asyncio.gather(first, *others)
        assert scorer.sent == [["first"], ["a", "b", "c"]]

    run(test, max_wait_seconds=5.0)


def test_an_idle_scorer_gets_a_sample_at_once_however_long_the_wait_may_be():
    async def test(batcher, scorer):
        async with asyncio.timeout(1):
            await ask(batcher, "a")

    run(test, max_wait_seconds=5.0)


def test_a_busy_scorer_is_sent_a_full_batch_ahead_and_no_third():
    async def test(batcher, scorer):
        scorer.free.clear()
        waiting = [asyncio.create_task(ask(batcher, *"abcd")) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert len(scorer.sent) == 2
        scorer.free.set()
        await asyncio.gather(*waiting)

    run(test, max_wait_seconds=5.0)


def test_more_replicas_are_sent_more_batches():
    async def test(batcher, scorer):
        batcher.set_num_replicas(3)
        scorer.free.clear()
        waiting = [asyncio.create_task(ask(batcher, *"abcd")) for _ in range(9)]
        await asyncio.sleep(0.05)
        assert len(scorer.sent) == 6
        scorer.free.set()
        await asyncio.gather(*waiting)

    run(test)


def test_a_client_that_left_is_dropped_from_the_queue():
    async def test(batcher, scorer):
        scorer.free.clear()
        first = asyncio.create_task(ask(batcher, "first"))
        await asyncio.sleep(0.01)
        leaver = asyncio.create_task(ask(batcher, "left", "too"))
        stayer = asyncio.create_task(ask(batcher, "stays"))
        await asyncio.sleep(0.01)
        leaver.cancel()
        await asyncio.sleep(0)
        scorer.free.set()
        await asyncio.gather(first, stayer)
        assert scorer.sent == [["first"], ["stays"]]

    run(test, max_wait_seconds=5.0)


def test_a_client_that_left_holds_no_place_in_the_queue_even_behind_one_that_stays():
    async def test(batcher, scorer):
        scorer.free.clear()
        first = asyncio.create_task(ask(batcher, *"abcdefgh"))  # two batches: all that is sent
        stayer = asyncio.create_task(ask(batcher, "stays"))
        await asyncio.sleep(0.01)
        for _ in range(50):
            leaver = asyncio.create_task(ask(batcher, *"left and gone"))
            await asyncio.sleep(0)
            leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)
        assert batcher.num_waiting == 1
        scorer.free.set()
        await asyncio.gather(first, stayer)

    run(test)


@pytest.mark.parametrize("part", ["send", "metrics"])
def test_a_bug_fails_the_requests_of_its_batch_at_once_and_no_others(part):
    class FailingMetrics(MetricStore):
        def observe(self, name, value, **labels):
            if part == "metrics" and (name, value) == ("batch_samples", 2):
                raise KeyError("a bug")

    async def test(batcher, scorer):
        def lose(names):
            if part == "send" and len(names) == 2:
                raise KeyError("a bug")

        scorer.loses = lose
        with pytest.raises(KeyError):
            await ask(batcher, "a", "b")
        assert await ask(batcher, "c") == ["c"]
        assert batcher.num_in_flight == 0

    run(test, metrics=FailingMetrics())


def test_a_batch_whose_scorer_died_is_scored_by_another_each_sample_alone():
    async def test(batcher, scorer):
        scorer.loses = lambda names: len(scorer.sent) == 1
        assert await ask(batcher, "a", "b") == ["a", "b"]
        assert scorer.sent == [["a", "b"], ["a"], ["b"]]

    run(test)


def test_a_sample_that_kills_every_scorer_is_given_up_and_its_neighbours_are_scored():
    async def test(batcher, scorer):
        scorer.loses = lambda names: "poison" in names
        poisoned = asyncio.create_task(ask(batcher, "poison"))
        healthy = asyncio.create_task(ask(batcher, "a", "b"))
        with pytest.raises(RequestError) as caught:
            await poisoned
        assert caught.value.error_type == "unavailable"
        assert await healthy == ["a", "b"]
        assert sum("poison" in batch for batch in scorer.sent) == MAX_ATTEMPTS

    run(test)


@pytest.mark.parametrize("num_samples", [1, 7])
def test_a_full_queue_refuses_one_sample_and_a_list_alike(num_samples):
    async def test(batcher, scorer):
        with batcher.accepted(10):
            with pytest.raises(RequestError) as caught, batcher.accepted(num_samples):
                pass
            assert caught.value.error_type == "overloaded"
            assert 1 <= caught.value.retry_after_seconds <= 30
        with batcher.accepted(num_samples):
            assert batcher.num_accepted == num_samples
        assert batcher.num_accepted == 0

    run(test, max_queued_samples=10)
