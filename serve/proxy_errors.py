"""Around Serve's own HTTP proxy: its refusals, which are plain text, in the one error shape.

Nothing but Serve itself answers an error without JSON: the web app catches everything. So a 500
here is a replica that was lost with the request, and that is a 503: it can be sent again.
"""

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_responses import error_response

TYPE_BY_STATUS = {404: "not_found", 429: "overloaded"}
SENTENCES = {
    "not_found": "there is no such path here, or nothing is served yet",
    "overloaded": "the server is busy; try again later",
    "unavailable": "no replica could answer; try again",
}


class ErrorShape:
    """Replaces the text of an error by JSON; everything else passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def send_in_shape(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and _is_serves_own(message):
                replaced = True
                await _answer(message["status"])(scope, receive, send)
            elif not replaced:
                await send(message)

        if scope["type"] == "http" and not scope["path"].startswith("/-/"):
            await self.app(scope, receive, send_in_shape)
        else:
            await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH asks for."""
    return [Middleware(ErrorShape)]


def _is_serves_own(message: Message) -> bool:
    content_type = dict(message.get("headers", ())).get(b"content-type", b"")
    return message["status"] >= 400 and not content_type.startswith(b"application/json")


def _answer(status: int) -> Response:
    error_type = TYPE_BY_STATUS.get(status, "unavailable")
    headers = {} if error_type == "not_found" else {"Retry-After": "1"}
    return error_response(error_type, SENTENCES[error_type], headers=headers)
