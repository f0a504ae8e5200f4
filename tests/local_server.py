"""The web app over real HTTP with the embedded selector, in this process and without Ray."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterator

import uvicorn

from serve.batching import BatchAnswer, BatchRequest
from serve.deployments import Scorer
from serve.http_protocol import HttpProtocol
from serve.model_description import ModelDescription
from serve.scoring_service import ScoringService
from serve.settings import ServeSettings
from serve.web_app import build_web_app
from tests.ray_head import free_port


class LocalScorers:
    """The scorer of a replica, called directly; `held` stops it as a stuck one would."""

    def __init__(self, settings: ServeSettings) -> None:
        self.scorer = Scorer(settings)
        self.may_score = threading.Event()
        self.may_score.set()
        self.num_to_hold = math.inf
        self.num_batches = 0
        self.num_alive = settings.num_replicas

    async def score(self, request: BatchRequest) -> BatchAnswer:
        self.num_batches += 1
        self.num_to_hold -= 1
        if self.num_to_hold >= 0:
            while not self.may_score.is_set():
                await asyncio.sleep(0.005)
        return await self.scorer.score(request)

    async def describe(self) -> ModelDescription:
        return self.scorer.describe()

    async def count_healthy(self, *, timeout_seconds: float) -> int:
        return self.num_alive

    @contextlib.contextmanager
    def held(self, *, num_batches: float = math.inf) -> Iterator[None]:
        """Holds so many batches that come now, and lets further ones pass."""
        self.num_to_hold = num_batches
        self.may_score.clear()
        try:
            yield
        finally:
            self.num_to_hold = math.inf
            self.may_score.set()


class LocalServer:
    def __init__(self, settings: ServeSettings, scorers: LocalScorers) -> None:
        self.scorers = scorers
        self.service = ScoringService(settings, scorers)

        async def read_metrics() -> list[dict]:
            return [self.service.metrics_snapshot()]

        app = build_web_app(self.service, read_metrics=read_metrics)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, log_level="critical", http=HttpProtocol
        )
        self.server = uvicorn.Server(config)


@contextlib.contextmanager
def local_server(settings: ServeSettings, scorers: LocalScorers) -> Iterator[LocalServer]:
    server = LocalServer(settings, scorers)
    thread = threading.Thread(target=server.server.run)
    thread.start()
    try:
        while server.service.why_unready() is not None or not server.server.started:
            assert thread.is_alive()
            threading.Event().wait(0.02)
        yield server
    finally:
        server.server.should_exit = True
        thread.join()
