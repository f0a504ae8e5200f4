"""Around Serve's own HTTP proxy: its refusals, which are plain text, in the one error shape.

Nothing but Serve itself answers an error without JSON: the web app catches everything. All of
them are a 503 then: a 500 is a replica that was lost with the request, which can be sent again, and
a 404 is an application that is not there yet or no more, since ours takes every path.
"""

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_responses import error_response


class ErrorShape:
    """Replaces the text of an error by JSON; everything else passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        begun = replaced = False

        async def send_in_shape(message: Message) -> None:
            nonlocal begun, replaced
            begun = True
            if message["type"] == "http.response.start" and _is_serves_own(message):
                replaced = True
                await _unavailable()(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_in_shape)
        if not begun:
            # So it ends where a replica dies that is being asked; the HTTP server would make it a
            # 500. A client that has gone does not hear this.
            await _unavailable()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH asks for."""
    return [Middleware(ErrorShape)]


def _is_serves_own(message: Message) -> bool:
    content_type = dict(message.get("headers", ())).get(b"content-type", b"")
    return message["status"] >= 400 and not content_type.startswith(b"application/json")


def _unavailable() -> Response:
    return error_response(
        "unavailable", "no replica could answer; try again", headers={"Retry-After": "1"}
    )
