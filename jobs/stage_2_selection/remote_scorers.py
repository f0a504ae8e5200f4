"""What asks others for scores, in the place of an engine: on a worker of the select job.

Both answer like `ScoringEngine.score`: all samples of a call make up the batches of one forward
pass after another, with no others among them, so that a shard gets the same bytes from everyone.
"""

import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from selectmoe.client import ScoreClient
from selectmoe.client.requests import RETRIED_STATUSES, RetryPolicy, ScoreFailure, ScoreResult
from selectmoe.errors import ScoreRequestError, ServerUnavailableError
from selectmoe.records import Sample, ScoredSample, UnscoredSample

# For a shard: as long as a lost replica of a large model takes to come back.
PATIENCE_SECONDS = 900.0


class ServerScorer:
    """Asks a score server; may be used by several threads."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.client = ScoreClient(url, api_key=api_key, timeout_seconds=PATIENCE_SECONDS)

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        answers = self.client.score_many(samples, detail="layers", batching="own")
        return [
            self._as_scored(sample, answer) for sample, answer in zip(samples, answers, strict=True)
        ]

    def _as_scored(
        self, sample: Sample, answer: ScoreResult | ScoreFailure
    ) -> ScoredSample | UnscoredSample:
        """The server's words in those of the pipeline."""
        if isinstance(answer, ScoreResult):
            return ScoredSample(
                sample_id=sample.sample_id,
                score=answer.score,
                num_tokens=answer.num_tokens,
                num_answer_tokens=answer.num_answer_tokens,
                truncated=answer.truncated,
                layer_scores=np.array(answer.layers, dtype=np.float32),
            )
        if answer.error_type == "validation" and answer.reason in ("", "validation"):
            # The row is good by our own reader: a server of another version would reject them all.
            raise ScoreRequestError(
                f"{self.client.url} takes {sample.source or sample.sample_id} for no sample: "
                f"{answer.error}",
                error_type=answer.error_type,
            )
        return UnscoredSample(sample.sample_id, answer.reason or answer.error_type, answer.error)


class DeploymentScorer:
    """Asks an application on this Ray cluster by its handle; may be used by several threads."""

    def __init__(self, application: str) -> None:
        from ray import serve

        self.name = f"application {application!r}"
        self.handle: Any = serve.get_app_handle(application)

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """Asks again where a replica is lost or the queue is full."""
        policy = RetryPolicy(PATIENCE_SECONDS)
        deadline = time.monotonic() + policy.timeout_seconds
        for num_tries in itertools.count(1):
            answers = self._ask(samples, max(deadline - time.monotonic(), 0.0))
            if isinstance(answers, list):
                return answers
            wait = policy.wait(num_tries, None, random.random())
            if time.monotonic() + wait >= deadline:
                raise ServerUnavailableError(
                    f"{self.name}: not available within {policy.timeout_seconds:g} s "
                    f"(tries: {num_tries}): {answers}"
                )
            time.sleep(wait)
        raise AssertionError("the loop ends by itself")

    def _ask(
        self, samples: Sequence[Sample], timeout_seconds: float
    ) -> list[ScoredSample | UnscoredSample] | str:
        """The answers, or what another try may mend."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

        try:
            answers: list[ScoredSample | UnscoredSample] = self.handle.score_many.remote(
                list(samples)
            ).result(timeout_s=timeout_seconds)
            return answers
        except (RayActorError, ReplicaUnavailableError, BackPressureError) as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        except TimeoutError:
            return "no answer"
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ScoreRequestError) and cause.status in RETRIED_STATUSES:
                return str(cause)
            raise cause if isinstance(cause, ScoreRequestError) else error from None
