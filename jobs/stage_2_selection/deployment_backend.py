"""The scoring backend `--via serve`: the deployment that runs on the same Ray cluster."""

import itertools
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.on_ray.session import ClusterError
from selectmoe.client.requests import parse_info, retry_wait
from selectmoe.client.wire import RETRIED_STATUSES
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ScoreRequestError, ServerUnavailableError
from selectmoe.records import Sample, ScoredSample, UnscoredSample
from selectmoe.selection.backends import (
    NO_SIGNALS,
    PATIENCE_SECONDS,
    SERVER_DEVICE,
    ServedBackend,
    require_agreement,
)
from selectmoe.selection.scored_shards import SampleScorer

DEPLOYMENT = "Scorer"
INFO_TIMEOUT_SECONDS = 60.0  # a replica may still be loading its model


@dataclass(frozen=True, kw_only=True)
class DeploymentBackend(ServedBackend):
    """A Serve application on this Ray cluster, called through its handle."""

    application: str

    @classmethod
    def connect(cls, config: SelectConfig) -> "DeploymentBackend":
        """Raises SelectMoeError where none runs, or it scores by other settings."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        found = [
            name
            for name, application in serve.status().applications.items()
            if DEPLOYMENT in application.deployments
        ]
        if len(found) != 1:
            running = f"{len(found)} applications with one: {', '.join(found)}" if found else "none"
            raise ClusterError(
                f"via=serve needs exactly one running deployment {DEPLOYMENT} on this Ray cluster, "
                f"got {running}; start it with 'python -m serve'"
            )
        handle: Any = serve.get_app_handle(found[0])
        info = parse_info(handle.info.remote().result(timeout_s=INFO_TIMEOUT_SECONDS))
        require_agreement(config, f"application {found[0]!r}", info)
        return cls(info=info, application=found[0])

    def open_scorer(self) -> SampleScorer:
        return DeploymentScorer(self.application, dtype=self.info.dtype)


class DeploymentScorer:
    """Scores samples through the handle of a Serve application; safe to share between threads."""

    def __init__(self, application: str, *, dtype: str) -> None:
        from ray import serve

        self.device_and_dtype = (SERVER_DEVICE, dtype)
        self.signal_sizes = NO_SIGNALS
        self.name = f"application {application!r}"
        self.handle: Any = serve.get_app_handle(application)

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """Retries while a replica is lost or the queue is full."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for num_tries in itertools.count(1):
            answers = self._ask(samples, max(deadline - time.monotonic(), 0.0))
            if isinstance(answers, list):
                return answers
            wait = retry_wait(num_tries, None, random.random())
            if time.monotonic() + wait >= deadline:
                raise ServerUnavailableError(
                    f"{self.name}: not available within {PATIENCE_SECONDS:g} s "
                    f"(tries: {num_tries}): {answers}"
                )
            time.sleep(wait)
        raise AssertionError("the loop ends by itself")

    def _ask(
        self, samples: Sequence[Sample], timeout_seconds: float
    ) -> list[ScoredSample | UnscoredSample] | str:
        """The results, or the reason of a failure that another try may mend."""
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
