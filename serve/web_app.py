"""The routes, and what every request passes: a key, limits, one error shape, metrics."""

import asyncio
import contextlib
import hmac
import logging
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import fastapi
import ray
import torch
import transformers
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import selectmoe
from selectmoe.scoring.calibration import as_json
from serve.error_responses import (
    RequestError,
    error_response,
    http_error_response,
    json_response,
)
from serve.metrics import Snapshot, add_up, prometheus_text
from serve.openapi import openapi_document
from serve.schemas import parse_request
from serve.scoring_service import ScoringService
from serve.settings import ServeSettings

WEB_FOLDER = Path(__file__).resolve().parent / "web"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The pages may talk to this server and to nobody else, whatever a sample's text says.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
}
CLIENT_GONE = 499  # as proxies count it; nobody is there to receive it

Siblings = Callable[[], Awaitable[list[Snapshot]]]

logger = logging.getLogger(__name__)


def build_web_app(service: ScoringService, *, siblings: Siblings) -> FastAPI:
    """siblings: the numbers of every ingress replica, this one's among them."""
    settings = service.settings

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="Select-MoE", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Gate, service=service)
    _add_scoring(app, service)
    _add_reports(app, service, siblings)
    _add_pages(app, settings)
    return app


def _add_scoring(app: FastAPI, service: ScoringService) -> None:
    @app.post("/score")
    async def score(request: Request) -> Response:
        service.require_room()
        with service.answering():
            body = await _read_body(request, service.settings.max_body_bytes)
            parsed = parse_request(body, max_samples=service.settings.max_samples_per_request)
            return json_response(await _while_connected(request, service.score(parsed)))


def _add_reports(app: FastAPI, service: ScoringService, siblings: Siblings) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        return json_response({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        reason = service.why_unready()
        if reason is not None:
            raise RequestError("unavailable", reason, retry_after_seconds=1)
        return json_response({"status": "ready"})

    @app.get("/info")
    async def info() -> Response:
        return json_response(information(service))

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            prometheus_text(add_up(await siblings())), headers={"Content-Type": METRICS_TYPE}
        )


def _add_pages(app: FastAPI, settings: ServeSettings) -> None:
    document = openapi_document(needs_key=settings.api_key is not None)
    pages = {name: (WEB_FOLDER / name).read_text("utf-8") for name in ("index.html", "docs.html")}

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(document)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(pages["index.html"], headers=PAGE_HEADERS)

    @app.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(pages["docs.html"], headers=PAGE_HEADERS)


class Gate:
    """Around every request: asks for the key, turns exceptions into answers, counts."""

    OPEN_ROUTES = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
    KEY_ROUTES = ("/score", "/info", "/metrics")

    def __init__(self, app: ASGIApp, service: ScoringService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = scope["path"] in self.OPEN_ROUTES + self.KEY_ROUTES
        route = scope["path"] if known else "other"  # a label for each path that is tried is a leak
        status = CLIENT_GONE

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self._answer(scope, receive, send_and_note)
        finally:
            metrics = self.service.metrics
            metrics.count("requests_total", route=route, status=str(status))
            metrics.observe("request_seconds", time.perf_counter() - started, route=route)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if scope["path"] not in self.OPEN_ROUTES:
                self._require_key(dict(scope["headers"]).get(b"authorization", b""))
            await self.app(scope, receive, send_and_note)
        except RequestError as error:
            await error.response()(scope, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:
            if begun:
                raise
            # The type alone: messages and frames may hold a sample's text, or the key.
            logger.error("a request failed: %s%s", type(error).__name__, _where(error))
            answer = error_response("internal", "the server failed on this request")
            await answer(scope, receive, send)

    def _require_key(self, given: bytes) -> None:
        key = self.service.settings.api_key
        if key is None:
            return
        scheme, _, token = given.partition(b" ")
        if not given:
            raise RequestError("unauthorized", "this needs the header 'Authorization: Bearer KEY'")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
            raise RequestError("unauthorized", "the key in the header Authorization is not valid")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = RequestError("too_large", f"the body must be at most {max_bytes:,} bytes")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def _while_connected(
    request: Request, answer: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """The answer; raises ClientDisconnect, and leaves the queue, once nobody waits for it."""
    scoring = asyncio.ensure_future(answer)
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


def information(service: ScoringService) -> dict[str, Any]:
    """What GET /info answers; raises RequestError before a scorer is warm."""
    settings, description = service.settings, service.description
    if description is None:
        raise RequestError("unavailable", "no scorer is warm yet", retry_after_seconds=2)
    calibration = description.calibration
    return {
        "model": description.model,
        "revision": description.revision,
        "weights_hash": description.weights_hash,
        "formula": description.formula,
        "device": description.device,
        "dtype": description.dtype,
        "num_layers": description.num_layers,
        "calibration": None if calibration is None else as_json(calibration),
        "limits": {
            "max_sequence_length": description.max_sequence_length,
            "max_batch_tokens": description.max_batch_tokens,
            "max_samples_per_request": settings.max_samples_per_request,
            "max_body_bytes": settings.max_body_bytes,
            "max_queued_samples": settings.max_queued_samples,
            "request_timeout_seconds": settings.request_timeout_seconds,
        },
        "versions": {
            "selectmoe": selectmoe.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ray": ray.__version__,
            "fastapi": fastapi.__version__,
        },
    }


def _where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return http_error_response(error.status_code, headers=error.headers)
