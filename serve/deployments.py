"""The two deployments: Scorer, which holds an engine, and Ingress, which holds the web app."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from selectmoe.errors import ScoreRequestError
from selectmoe.records import Message, Sample, TokenizedSample, UnscoredSample
from serve.batching import BatchAnswer, BatchRequest, Outcome, ScorerLostError
from serve.error_responses import RequestError
from serve.metrics import Snapshot
from serve.model_description import ModelDescription
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from selectmoe.scoring.engine import ScoringEngine

WARM_UP = Sample("", "warm-up", (Message("user", "Ready?"), Message("assistant", "Ready.")))
DESCRIBE_AGAIN_SECONDS = 1.0
METRICS_TIMEOUT_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Scorer:
    """One engine on its own thread, so that the replica answers health checks while it scores."""

    def __init__(self, settings: ServeSettings) -> None:
        self._stall_timeout_seconds = settings.stall_timeout_seconds
        self._scored_since: float | None = None  # start time of the current batch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._engine = self._thread.submit(_load_engine, settings).result()
        self._description = _describe(self._engine, settings)

    def describe(self) -> ModelDescription:
        return self._description

    async def score(self, request: BatchRequest) -> BatchAnswer:
        """One outcome for each sample; one on which the model fails does not affect the others."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, request)

    def check_health(self) -> None:
        """Raises if a batch is stuck; Serve then replaces this replica."""
        since = self._scored_since
        if since is not None and time.monotonic() - since > self._stall_timeout_seconds:
            raise RuntimeError(f"a batch is stuck for more than {self._stall_timeout_seconds:g} s")

    def _score(self, request: BatchRequest) -> BatchAnswer:
        started = self._scored_since = time.monotonic()
        try:
            outcomes = _score_batch(self._engine, request)
        finally:
            self._scored_since = None
        return BatchAnswer(tuple(outcomes), time.monotonic() - started)


def _load_engine(settings: ServeSettings) -> "ScoringEngine":
    """Loads the model and scores one sample, so that a running replica is warm."""
    import torch

    from selectmoe.scoring.engine import ScoringEngine

    torch.set_num_threads(settings.num_cpus_per_replica)
    device = settings.device or ("cuda" if settings.num_gpus_per_replica else "cpu")
    engine = ScoringEngine.from_pretrained(
        settings.model,
        model_checkpoint_path=settings.model_checkpoint_path,
        device=device,
        config=settings.engine,
    )
    [outcome] = engine.score([WARM_UP])
    if isinstance(outcome, UnscoredSample):
        raise RuntimeError(f"the warm-up sample has no score: {outcome.detail}")
    return engine


def _describe(engine: "ScoringEngine", settings: ServeSettings) -> ModelDescription:
    return ModelDescription(
        model=settings.model_name,
        revision=settings.revision,
        weights_hash=engine.weights_hash(),
        formula=engine.config.formula,
        length=engine.length,
        turns=engine.config.turns,
        device=engine.device.type,
        dtype=engine.device_and_dtype[1],
        num_layers=engine.num_layers,
        max_sequence_length=engine.tokenizer.max_sequence_length,
        max_tokens_per_batch=engine.max_tokens_per_batch,
        is_packed=engine.packed is not None,
        calibration=engine.calibration,
    )


def _score_batch(engine: "ScoringEngine", request: BatchRequest) -> list[Outcome]:
    """Scores the samples that need token scores, and the others, in separate forward passes."""
    from selectmoe.data.packing import pad_samples, pad_samples_closely

    # A request's own batch was one padded batch in the ingress already; others are mixed lengths.
    packer = pad_samples if request.in_one_pass else pad_samples_closely
    score_samples = functools.partial(engine.score_tokenized, packer=packer)
    score_tokens = functools.partial(engine.score_each_token, packer=pad_samples_closely)
    outcomes: list[Outcome | None] = [None] * len(request.samples)
    for with_tokens, score in ((False, score_samples), (True, score_tokens)):
        indices = [index for index, want in enumerate(request.with_tokens) if want == with_tokens]
        samples = [request.samples[index] for index in indices]
        for index, outcome in zip(indices, _score_or_isolate(score, samples), strict=True):
            outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _score_or_isolate(score: Any, samples: Sequence[TokenizedSample]) -> list[Outcome]:  # noqa: ANN401
    """Scores all samples together; if the model fails, each alone, to isolate the cause."""
    if not samples:
        return []
    try:
        return list(score(samples))
    except Exception as error:
        if len(samples) == 1:
            # Only the type: a message may quote the sample.
            logger.error("the model failed on a sample: %s", type(error).__name__)
            detail = "the model failed on this sample"
            return [UnscoredSample(samples[0].sample_id, "internal", detail)]
        return [outcome for one in samples for outcome in _score_or_isolate(score, [one])]


class ScorerPool:
    """The scorers, for the ingress: wraps Ray's handle and its errors."""

    def __init__(self, handle: DeploymentHandle, *, stall_timeout_seconds: float) -> None:
        self._handle = handle
        # Later than the replica's own health check, and long before the client times out.
        self._timeout_seconds = 1.2 * stall_timeout_seconds

    async def score(self, request: BatchRequest) -> BatchAnswer:
        """Raises ScorerLostError if the scorer died or does not answer."""
        try:
            return await asyncio.wait_for(self._handle.score.remote(request), self._timeout_seconds)
        except (RayError, RayServeException, TimeoutError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # this task was cancelled; otherwise the replica was, during the batch
            logger.warning(
                "a batch of %d samples is lost: %s", len(request.samples), _error_name(error)
            )
            raise ScorerLostError from error

    async def describe(self) -> ModelDescription:
        """Waits until a scorer is warm, however often one has to be started."""
        while True:
            try:
                description: ModelDescription = await self._handle.describe.remote()
                return description
            except (RayError, RayServeException) as error:
                logger.warning("no scorer describes the model yet: %s", _error_name(error))
                await asyncio.sleep(DESCRIBE_AGAIN_SECONDS)

    async def count_healthy(self, *, timeout_seconds: float) -> int:
        """The number of scorers that pass a health check; 0 unless all answer in time."""
        try:
            answers = await self._handle.broadcast("check_health").results_async(
                timeout_s=timeout_seconds, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError, RuntimeError) as error:
            logger.warning("a scorer did not answer the health check: %s", _error_name(error))
            return 0
        return sum(answer is None for answer in answers)  # the others are exceptions


def _error_name(error: BaseException) -> str:
    # Messages of Ray's errors hold tracebacks, and these the arguments of the call.
    return "replica died" if isinstance(error, RayActorError) else type(error).__name__


class Ingress:
    """Validates, tokenizes and batches requests, in the web app."""

    def __init__(self, settings: ServeSettings, scorer: DeploymentHandle) -> None:
        from serve.scoring_service import ScoringService

        settings.require_key_for(served_host())  # Serve may have restarted with another host
        pool = ScorerPool(scorer, stall_timeout_seconds=settings.stall_timeout_seconds)
        self._service = ScoringService(settings, pool)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve.http_proxies import proxies_set_up
        from serve.web_app import build_web_app

        return build_web_app(
            self._service, read_metrics=_ingress_metrics, http_server=proxies_set_up()
        )

    async def score_many(self, samples: list[Sample]) -> list[Outcome]:
        """For jobs on this cluster, through a handle: scores samples without HTTP."""
        with _as_client_errors():
            return await self._service.score_samples(samples)

    def info(self) -> dict[str, Any]:
        """For jobs on this cluster, through a handle: the body of GET /info."""
        from serve.web_app import service_info

        with _as_client_errors():
            return service_info(self._service).model_dump()

    def check_health(self) -> None:
        self._service.check_health()

    async def drain(self) -> None:
        """Refuses new requests, and returns when all accepted ones are answered."""
        await self._service.drain()

    def metrics(self) -> Snapshot:
        """The metrics of this replica."""
        return self._service.metrics_snapshot()


@contextlib.contextmanager
def _as_client_errors() -> Iterator[None]:
    """Raises the client's error instead of ours, which jobs cannot import."""
    try:
        yield
    except RequestError as error:
        raise ScoreRequestError(
            str(error), status=error.status, error_type=error.error_type
        ) from None


async def _ingress_metrics() -> list[Snapshot]:
    """The metrics of every ingress replica, this one included, except those that just died."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        answers = await handle.broadcast("metrics").results_async(
            timeout_s=METRICS_TIMEOUT_SECONDS, return_exceptions=True
        )
    except TimeoutError:
        raise RequestError(
            "unavailable", "an ingress replica did not report its metrics", retry_after_seconds=5
        ) from None
    return [answer for answer in answers if isinstance(answer, dict)]


def served_host() -> str:
    """The address that Serve listens on, or would listen on if it ran."""
    # Serve's public API has no function for this: its status lists nodes, not bound addresses.
    from ray.serve.context import _get_global_client

    client = None
    if ray.is_initialized():
        client = _get_global_client(raise_if_no_controller_running=False)
    options = HTTPOptions() if client is None else client.http_config
    return str(options.host)
