"""Serve's own plain-text errors reach clients in the one shape; everything else passes."""

import asyncio
import json

import pytest
import uvicorn
from ray.serve._private.http_util import validate_http_proxy_callback_return
from starlette.responses import JSONResponse, PlainTextResponse

from serve.http_protocol import HttpProtocol
from serve.http_proxies import set_up_server
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


@pytest.mark.parametrize("target", ["http://a.test/score", "HTTPS://a.test:8000/score", "/score"])
def test_a_path_with_its_host_before_it_is_that_path(target):
    async def repeat_path(scope, receive, send):
        body = {"path": scope["path"], "raw_path": scope.get("raw_path", b"").decode()}
        await JSONResponse(body)(scope, receive, send)

    assert json.loads(ask(repeat_path, path=target)[2])["path"] == "/score"


def test_what_no_application_gets_is_no_path_of_ours():
    status, _, body = ask(says_nothing, path="*")
    assert (status, json.loads(body)["error_type"]) == (404, "not_found")


def test_a_server_that_is_set_up_twice_has_one_shape_around_its_app():
    server = uvicorn.Server(uvicorn.Config(says_nothing, log_config=None))
    server.config.load()
    for _ in range(2):
        set_up_server(server)
    assert server.config.http_protocol_class is HttpProtocol
    assert server.config.loaded_app.app is not says_nothing  # uvicorn's own wrapper
    assert not isinstance(server.config.loaded_app.app, JsonErrorMiddleware)


def test_serve_takes_the_callback():
    assert len(validate_http_proxy_callback_return(middlewares())) == 1
