"""Serve's own plain-text errors reach clients in the one shape; everything else passes."""

import asyncio
import json

import pytest
from ray.serve._private.http_util import validate_http_proxy_callback_return
from starlette.responses import JSONResponse, PlainTextResponse

from serve.proxy_errors import JsonErrorMiddleware, middlewares


def ask(app, *, path="/score"):
    """(status, headers, body) of one request to `app` inside the shape."""
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "POST", "headers": []}
    asyncio.run(JsonErrorMiddleware(app)(scope, receive, send))
    [start, *parts] = sent
    body = b"".join(part.get("body", b"") for part in parts)
    return start["status"], dict(start["headers"]), body


async def says_nothing(scope, receive, send):
    """As Serve's proxy when the replica dies that it has asked."""


@pytest.mark.parametrize(
    "app",
    [
        says_nothing,
        *(PlainTextResponse("Serve says no", status_code=s) for s in (404, 408, 500, 503)),
    ],
)
def test_a_refusal_of_serve_is_a_503_in_our_shape(app):
    status, headers, body = ask(app)
    assert status == 503
    assert json.loads(body)["error_type"] == "unavailable"
    assert headers[b"retry-after"] == b"1"
    assert b"Serve says no" not in body


@pytest.mark.parametrize("status", [200, 404, 429, 500])
def test_our_own_answers_pass_as_they_are(status):
    app = JSONResponse({"own": True}, status_code=status)
    assert ask(app)[0] == status
    assert json.loads(ask(app)[2]) == {"own": True}


def test_serve_s_health_routes_stay_text():
    assert ask(PlainTextResponse("no", status_code=503), path="/-/healthz")[2] == b"no"


def test_serve_takes_the_callback():
    assert len(validate_http_proxy_callback_return(middlewares())) == 1
