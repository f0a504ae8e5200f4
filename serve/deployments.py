"""What Serve's replicas hold: the scorer one engine, the ingress the web app. No maths, no HTTP."""

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
from serve.error_responses import STATUS_BY_ERROR_TYPE, RequestError
from serve.metrics import Snapshot
from serve.model_description import ModelDescription
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from selectmoe.scoring.engine import ScoringEngine

WARM_UP = Sample("", "warm-up", (Message("user", "Ready?"), Message("assistant", "Ready.")))
DESCRIBE_AGAIN_SECONDS = 1.0
SIBLINGS_TIMEOUT_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Scorer:
    """One engine on a thread of its own, so that the replica answers while it computes."""

    def __init__(self, settings: ServeSettings) -> None:
        self._stall_timeout_seconds = settings.stall_timeout_seconds
        self._scored_since: float | None = None  # when the batch that is scored now began
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._engine = self._thread.submit(_load_engine, settings).result()
        self._description = _describe(self._engine, settings)

    def describe(self) -> ModelDescription:
        return self._description

    async def score(self, request: BatchRequest) -> BatchAnswer:
        """One outcome a sample; a sample that the model fails on leaves its neighbours alone."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, request)

    def answer_roll_call(self) -> bool:
        """Raises where a batch is stuck."""
        self.check_health()
        return True

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        since = self._scored_since
        if since is not None and time.monotonic() - since > self._stall_timeout_seconds:
            raise RuntimeError(f"a batch is stuck for more than {self._stall_timeout_seconds:g} s")

    def _score(self, request: BatchRequest) -> BatchAnswer:
        started = self._scored_since = time.monotonic()
        try:
            outcomes = _score_apart(self._engine, request)
        finally:
            self._scored_since = None
        return BatchAnswer(tuple(outcomes), time.monotonic() - started)


def _load_engine(settings: ServeSettings) -> "ScoringEngine":
    """Loads the model and scores once, so that a replica that runs is warm."""
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
        device=engine.device.type,
        dtype=str(engine.model.dtype).removeprefix("torch."),
        num_layers=engine.model.config.num_hidden_layers,
        max_sequence_length=engine.tokenizer.max_sequence_length,
        max_batch_tokens=engine.max_tokens_per_batch,
        rows_end_to_end=engine.packed is not None,
        calibration=engine.calibration,
    )


def _score_apart(engine: "ScoringEngine", request: BatchRequest) -> list[Outcome]:
    """Samples that want scores of tokens, and the rest, each in as few passes as they need."""
    from selectmoe.data.packing import pad_samples, pad_samples_closely

    # A padded batch of the request's own is one batch again; others are the samples of a moment.
    packer = pad_samples if request.is_rectangle else pad_samples_closely
    together = functools.partial(engine.score_tokenized, packer=packer)
    by_token = functools.partial(engine.score_each_token, packer=pad_samples_closely)
    outcomes: list[Outcome | None] = [None] * len(request.samples)
    scorers: Any = ((False, together), (True, by_token))
    for with_tokens, score in scorers:
        places = [place for place, wants in enumerate(request.with_tokens) if wants == with_tokens]
        chosen = [request.samples[place] for place in places]
        for place, outcome in zip(places, _score_or_single_out(score, chosen), strict=True):
            outcomes[place] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _score_or_single_out(score: Any, samples: Sequence[TokenizedSample]) -> list[Outcome]:  # noqa: ANN401
    """All together; should the model fail on that, each alone, to find the one it fails on."""
    if not samples:
        return []
    try:
        return list(score(samples))
    except Exception as error:
        if len(samples) == 1:
            # Only the type: a message may quote what it was about.
            logger.error("the model failed on a sample: %s", type(error).__name__)
            detail = "the model failed on this sample"
            return [UnscoredSample(samples[0].sample_id, "internal", detail)]
        return [outcome for one in samples for outcome in _score_or_single_out(score, [one])]


class ScorerPool:
    """The scorers as the ingress sees them: hides Ray's handle and its errors."""

    def __init__(self, handle: DeploymentHandle, *, stall_timeout_seconds: float) -> None:
        self._handle = handle
        # A little later than the replica itself notices, and long before the client gives up.
        self._timeout_seconds = 1.2 * stall_timeout_seconds

    async def score(self, request: BatchRequest) -> BatchAnswer:
        """Raises ScorerLostError where the scorer died or does not answer."""
        try:
            return await asyncio.wait_for(self._handle.score.remote(request), self._timeout_seconds)
        except (RayError, RayServeException, TimeoutError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # we are; otherwise the replica was, in the middle of the batch
            logger.warning("a batch of %d samples is lost: %s", len(request.samples), _kind(error))
            raise ScorerLostError from error

    async def describe(self) -> ModelDescription:
        """Waits for a scorer to be warm, however often one has to be started."""
        while True:
            try:
                description: ModelDescription = await self._handle.describe.remote()
                return description
            except (RayError, RayServeException) as error:
                logger.warning("no scorer describes the model yet: %s", _kind(error))
                await asyncio.sleep(DESCRIBE_AGAIN_SECONDS)

    async def call_the_roll(self, *, timeout_seconds: float) -> int:
        """How many scorers answer, each one asked; 0 where they do not all in time."""
        try:
            answers = await self._handle.broadcast("answer_roll_call").results_async(
                timeout_s=timeout_seconds, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError, RuntimeError) as error:
            logger.warning("a scorer does not answer the roll call: %s", _kind(error))
            return 0
        return sum(answer is True for answer in answers)


def _kind(error: BaseException) -> str:
    # A message of Ray's holds stack traces, and these the arguments of the call.
    return "replica died" if isinstance(error, RayActorError) else type(error).__name__


class Ingress:
    """Validates, tokenises and batches; the web app does all of it."""

    def __init__(self, settings: ServeSettings, scorer: DeploymentHandle) -> None:
        from serve.scoring_service import ScoringService

        settings.require_key_for(served_host())  # an application may be older than its Serve
        pool = ScorerPool(scorer, stall_timeout_seconds=settings.stall_timeout_seconds)
        self._service = ScoringService(settings, pool)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve.web_app import build_web_app

        return build_web_app(self._service, siblings=_sibling_metrics)

    async def score_many(self, samples: list[Sample]) -> list[Outcome]:
        """For the handle of a job on this cluster: samples as it has them, without HTTP."""
        with _told_to_jobs():
            return await self._service.score_samples(samples)

    def info(self) -> dict[str, Any]:
        """For the handle: GET /info."""
        from serve.web_app import information

        with _told_to_jobs():
            return information(self._service)

    def check_health(self) -> None:
        self._service.check_health()

    async def drain(self) -> None:
        """Refuses what comes, and returns when what was accepted is answered."""
        await self._service.drain()

    def metrics(self) -> Snapshot:
        """This replica's own numbers."""
        return self._service.metrics_snapshot()


@contextlib.contextmanager
def _told_to_jobs() -> Iterator[None]:
    """Errors as jobs know them, who import nothing from here."""
    try:
        yield
    except RequestError as error:
        status = STATUS_BY_ERROR_TYPE[error.error_type]
        raise ScoreRequestError(str(error), status=status, error_type=error.error_type) from None


async def _sibling_metrics() -> list[Snapshot]:
    """The numbers of every ingress replica, this one's among them; without those that just died."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        answers = await handle.broadcast("metrics").results_async(
            timeout_s=SIBLINGS_TIMEOUT_SECONDS, return_exceptions=True
        )
    except TimeoutError:
        raise RequestError(
            "unavailable", "an ingress replica does not tell its numbers", retry_after_seconds=5
        ) from None
    return [answer for answer in answers if isinstance(answer, dict)]


def served_host() -> str:
    """The address that Serve listens on, whoever configured it; where it does not run, would."""
    # Not in Serve's public API: its status names the proxies' nodes, not what they are bound to.
    from ray.serve.context import _get_global_client

    client = None
    if ray.is_initialized():
        client = _get_global_client(raise_if_no_controller_running=False)
    options = HTTPOptions() if client is None else client.http_config
    return str(options.host)
