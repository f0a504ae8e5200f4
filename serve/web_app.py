"""The routes of the service."""

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import fastapi
import ray
import torch
import transformers
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

import selectmoe
from selectmoe.scoring.calibration import as_json
from serve.error_responses import RequestError, WireResponse, on_http_error
from serve.metrics import Snapshot, prometheus_text, sum_snapshots
from serve.openapi import SCORE_REQUEST, document_referenced_bodies, error_responses
from serve.request_body import read_body
from serve.request_middleware import RequestMiddleware
from serve.request_parsing import parse_request
from serve.schemas import Health, Info, Limits, ScoreResponse
from serve.scoring_service import ScoringService

DESCRIPTION = (
    "Scores instruction-tuning samples with the quality gates of a Mixture-of-Experts model: "
    "higher is better to train on."
)
WEB_FOLDER = Path(__file__).resolve().parent / "web"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The pages may connect to this server only, whatever the text of a sample holds.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
}

ReadMetrics = Callable[[], Awaitable[list[Snapshot]]]


def build_web_app(
    service: ScoringService,
    *,
    read_metrics: ReadMetrics,
    http_server: contextlib.AbstractAsyncContextManager[None] | None = None,
) -> FastAPI:
    """read_metrics: returns the metrics of every ingress replica, this one included.

    http_server: entered before the first request; sets up the server in front of the app.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with http_server or contextlib.nullcontext(), service.running():
            yield

    app = FastAPI(
        title="Select-MoE",
        version=selectmoe.__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # RequestMiddleware takes /score/ for /score
        lifespan=lifespan,
        default_response_class=WireResponse,
        exception_handlers={HTTPException: on_http_error},
        generate_unique_id_function=lambda route: route.name,
        responses=error_responses(500),
    )
    app.add_middleware(RequestMiddleware, service=service)
    app.include_router(_protected_routes(service, read_metrics))
    _add_health(app, service)
    _add_pages(app)
    document_referenced_bodies(app)
    return app


def _protected_routes(service: ScoringService, read_metrics: ReadMetrics) -> APIRouter:
    router = APIRouter()
    if service.settings.api_key is not None:
        # For the documentation alone: RequestMiddleware checks the key, before anything is read.
        scheme = HTTPBearer(scheme_name="key", auto_error=False)
        router = APIRouter(dependencies=[Security(scheme)], responses=error_responses(401))

    @router.post(
        "/score",
        summary="Score samples",
        responses=error_responses(408, 413, 415, 422, 429, 503),
        response_model=ScoreResponse,
        openapi_extra=SCORE_REQUEST,
    )
    async def score(request: Request) -> Response:
        """One sample or a list. Results are in the order of the samples; in a list, a sample
        without a score has an error instead. Only a list in which no sample is well-formed is
        refused as a whole."""
        service.require_room()
        with service.answering():
            body = await read_body(request, service.settings)
            parsed = parse_request(body, max_samples=service.settings.max_samples_per_request)
            response = await _while_connected(request, service.score(parsed))
            # Rendered here, not by FastAPI: drain() must not end while a long list is rendered.
            return WireResponse(response.model_dump(exclude_unset=True))

    @router.get("/info", summary="Model and limits", responses=error_responses(503))
    async def info() -> Info:
        return service_info(service)

    @router.get(
        "/metrics",
        summary="Prometheus metrics, summed over replicas",
        responses=error_responses(503),
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        text = prometheus_text(sum_snapshots(await read_metrics()))
        return PlainTextResponse(text, headers={"Content-Type": METRICS_TYPE})

    return router


def _add_health(app: FastAPI, service: ScoringService) -> None:
    @app.get("/health/live", summary="Whether the server runs")
    async def live() -> Health:
        return Health(status="live")

    @app.get(
        "/health/ready", summary="Whether every scorer answers", responses=error_responses(503)
    )
    async def ready() -> Health:
        reason = service.why_unready()
        if reason is not None:
            raise RequestError("unavailable", reason, retry_after_seconds=1)
        return Health(status="ready")


def _add_pages(app: FastAPI) -> None:
    pages = {name: (WEB_FOLDER / name).read_text("utf-8") for name in ("index.html", "docs.html")}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(pages["index.html"], headers=PAGE_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(pages["docs.html"], headers=PAGE_HEADERS)


async def _while_connected(
    request: Request, response: Coroutine[Any, Any, ScoreResponse]
) -> ScoreResponse:
    """Awaits the response; cancels it and raises ClientDisconnect once the client is gone."""
    scoring = asyncio.ensure_future(response)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((scoring, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise ClientDisconnect
        return scoring.result()
    finally:
        scoring.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def service_info(service: ScoringService) -> Info:
    """Raises RequestError until a scorer is warm."""
    settings, (_, _, description) = service.settings, service.warm_parts()
    calibration = description.calibration
    return Info(
        model=description.model,
        revision=description.revision,
        weights_hash=description.weights_hash,
        formula=description.formula,
        length=description.length,
        turns=description.turns,
        device=description.device,
        dtype=description.dtype,
        num_layers=description.num_layers,
        calibration=None if calibration is None else as_json(calibration),
        limits=Limits(
            max_sequence_length=description.max_sequence_length,
            max_tokens_per_batch=description.max_tokens_per_batch,
            max_samples_per_request=settings.max_samples_per_request,
            max_body_bytes=settings.max_body_bytes,
            max_queued_samples=settings.max_queued_samples,
            request_timeout_seconds=settings.request_timeout_seconds,
        ),
        versions={
            "python": platform.python_version(),
            **{
                module.__name__: module.__version__
                for module in (selectmoe, torch, transformers, ray, fastapi)
            },
        },
    )
