"""A middleware of Serve's HTTP proxy that turns its plain-text errors into our JSON errors.

Only Serve itself answers an error without JSON, since the web app catches every exception. Each of
these becomes a 503: a 500 is a replica that died with the request, which can be sent again, and a
404 is an application that is not deployed yet or no longer, since ours handles every path.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.error_responses import MESSAGES, RequestError

UNAVAILABLE = RequestError(
    "unavailable", "no replica could answer; try again", retry_after_seconds=1
)


class JsonErrorMiddleware:
    """Replaces plain-text errors; everything else passes unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        scope = _with_path(scope)
        if not scope["path"].startswith("/"):  # OPTIONS *, which no application gets
            await RequestError("not_found", MESSAGES["not_found"]).response()(scope, receive, send)
            return
        has_started = is_replaced = False

        async def replace_plain_text(message: Message) -> None:
            nonlocal has_started, is_replaced
            has_started = True
            if message["type"] == "http.response.start" and _is_plain_text_error(message):
                is_replaced = True
                await UNAVAILABLE.response()(scope, receive, send)
            elif not is_replaced:
                await send(message)

        await self.app(scope, receive, replace_plain_text)
        if not has_started:
            # A replica that dies while it handles the request ends it without a response, of which
            # the HTTP server would make a 500. A client that has disconnected receives nothing.
            await UNAVAILABLE.response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """The callback of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(JsonErrorMiddleware)]


def _is_plain_text_error(message: Message) -> bool:
    content_type = dict(message.get("headers", ())).get(b"content-type", b"")
    return message["status"] >= 400 and not content_type.startswith(b"application/json")


def _with_path(scope: Scope) -> Scope:
    """Takes `http://HOST/path` as /path: RFC 9112, 3.2.2 allows clients to write either."""
    scheme, separator, rest = scope["path"].partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        return scope
    path = "/" + rest.partition("/")[2]
    return {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogateescape")}
