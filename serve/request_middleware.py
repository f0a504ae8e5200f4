"""The middleware around every request: path, API key, errors, metrics."""

import hmac
import logging
import time
import traceback
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_responses import RequestError
from serve.scoring_service import ScoringService

CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody receives it
WEBSOCKET_REFUSAL = RequestError(
    "bad_request", "this server has no WebSocket; send HTTP requests, see GET /docs"
)

logger = logging.getLogger(__name__)


class RequestMiddleware:
    """Around every request: checks the API key, turns exceptions into responses, counts."""

    PUBLIC_ROUTES = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
    PROTECTED_ROUTES = ("/score", "/info", "/metrics")

    def __init__(self, app: ASGIApp, service: ScoringService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            send = _without_body(send)
        scope = _as_routed(scope)
        status: int | None = None

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            if scope["path"] not in self.PUBLIC_ROUTES:
                self._require_key(dict(scope["headers"]).get(b"authorization", b""))
            await self.app(scope, receive, send_and_record_status)
        except ClientDisconnect:
            pass
        except Exception as error:
            if status is not None:
                raise  # the response has begun already
            await _error_response(error)(scope, receive, send_and_record_status)
        finally:
            self._count(scope["path"], status or CLIENT_CLOSED_REQUEST, started)

    def _count(self, path: str, status: int, started: float) -> None:
        is_known = path in self.PUBLIC_ROUTES + self.PROTECTED_ROUTES
        route = path if is_known else "other"  # arbitrary paths as labels would fill the memory
        metrics = self.service.metrics
        metrics.count("requests_total", route=route, status=str(status))
        metrics.observe("request_seconds", time.perf_counter() - started, route=route)

    def _require_key(self, header: bytes) -> None:
        key = self.service.settings.api_key
        if key is None:
            return
        scheme, _, token = header.partition(b" ")
        if not header:
            raise RequestError(
                "unauthorized", "this request needs the header 'Authorization: Bearer KEY'"
            )
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode()):
            raise RequestError("unauthorized", "the key in the header Authorization is not valid")


def _error_response(error: Exception) -> Response:
    if not isinstance(error, RequestError):
        # Only type and line: messages and frames may hold the text of a sample, or the key.
        [frame] = traceback.extract_tb(error.__traceback__, limit=-1)
        line = f"{Path(frame.filename).name}:{frame.lineno}"
        logger.error("a request failed: %s at %s", type(error).__name__, line)
        error = RequestError("internal", "the server failed on this request")
    return error.response()


def _as_routed(scope: Scope) -> Scope:
    """The request as the routes know it: HEAD is answered as GET is, /score/ as /score."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}


def _without_body(send: Send) -> Send:
    """For HEAD: the headers say what GET would answer, and nothing follows them."""

    async def send_headers(message: Message) -> None:
        await send({**message, "body": b""} if "body" in message else message)

    return send_headers


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers the handshake, with our JSON where the server can send it."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await WEBSOCKET_REFUSAL.response()(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1000})  # the handshake gets a 403
