"""What a request asks for with "batching": "own"."""

import asyncio
import contextlib

import numpy as np
import pytest

from selectmoe.data.packing import pack_samples, pad_samples
from selectmoe.records import ScoredSample, TokenizedSample
from serve.batching import BatchAnswer, Batcher, ScorerLostError
from serve.error_responses import RequestError
from serve.request_parsing import parse_request

MAX_BATCH_TOKENS = 60
LENGTHS = (7, 30, 12, 5, 28, 9, 16, 61, 3, 12)


def samples(prefix):
    return [
        TokenizedSample(
            f"{prefix}{number}", np.arange(length, dtype=np.int32), np.ones(length, bool), False
        )
        for number, length in enumerate(LENGTHS)
    ]


class Scorers:
    """Answers with each sample's length as its score, and keeps what it was sent."""

    def __init__(self, num_lost=0):
        self.num_lost = num_lost
        self.batches = []

    async def __call__(self, request):
        self.batches.append(request)
        is_lost = len(self.batches) <= self.num_lost
        await asyncio.sleep(0.002)  # others are sent meanwhile
        if is_lost:
            raise ScorerLostError
        outcomes = [
            ScoredSample(s.sample_id, float(len(s.token_ids)), 1, 1, False, np.zeros(1))
            for s in request.samples
        ]
        return BatchAnswer(tuple(outcomes), 0.002)

    def names(self, *, in_one_pass):
        return [
            tuple(sample.sample_id for sample in batch.samples)
            for batch in self.batches
            if batch.in_one_pass == in_one_pass
        ]


def scores_of(scorers, *calls, packer=pad_samples):
    """The answers of several requests that arrive together: (samples, batching) each."""

    async def score():
        batcher = Batcher(
            scorers, max_tokens_per_batch=MAX_BATCH_TOKENS, max_wait_seconds=0.01,
            max_queued_samples=1_000, packer=packer,
        )  # fmt: skip
        task = asyncio.create_task(batcher.run())
        try:
            return await asyncio.gather(
                *(
                    batcher.score(samples, with_tokens=False, batching=batching)
                    for samples, batching in calls
                )
            )
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return asyncio.run(score())


def padded_batches(samples):
    batches = pad_samples(samples, max_tokens_per_batch=MAX_BATCH_TOKENS)
    return [tuple(samples[n].sample_id for n in batch.positions) for batch in batches]


def test_the_batches_are_those_of_the_select_job_whoever_else_asks():
    scorers, own = Scorers(), samples("own")
    answers = scores_of(scorers, (samples("a"), "shared"), (own, "own"), (samples("b"), "shared"))
    assert scorers.names(in_one_pass=True) == padded_batches(own)
    assert not any("own" in name for batch in scorers.names(in_one_pass=False) for name in batch)
    for outcomes in answers:
        assert [outcome.score for outcome in outcomes] == list(LENGTHS)


def test_a_batch_whose_scorer_is_lost_goes_to_another_as_it_was():
    scorers, own = Scorers(num_lost=1), samples("own")
    [outcomes] = scores_of(scorers, (own, "own"))
    assert [outcome.score for outcome in outcomes] == list(LENGTHS)
    sent = scorers.names(in_one_pass=True)
    assert sorted(sent) == sorted([*padded_batches(own), sent[0]])


def test_the_request_says_it_and_says_what_it_may_say():
    body = b'{"samples": {"text": "Hi"}%s}'
    assert parse_request(body % b"", max_samples=1).options.batching == "shared"
    assert parse_request(body % b', "batching": "own"', max_samples=1).options.batching == "own"
    for wrong in (b'"alone"', b"null", b"[]", b"{}", b"1"):
        with pytest.raises(RequestError, match="batching: must be 'shared' or 'own'"):
            parse_request(body % (b', "batching": ' + wrong), max_samples=1)


def test_a_packed_request_has_the_batches_of_the_select_job_too():
    scorers, own = Scorers(), samples("own")
    scores_of(scorers, (own, "own"), packer=pack_samples)
    batches = pack_samples(own, max_tokens_per_batch=MAX_BATCH_TOKENS)
    expected = [tuple(sample.sample_id for sample in batch.samples) for batch in batches]
    assert scorers.names(in_one_pass=True) == expected
    assert expected != padded_batches(own)
