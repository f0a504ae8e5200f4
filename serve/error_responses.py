"""The error response of every status other than 200, and the exception that becomes it."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from selectmoe.client.wire import STATUS_BY_ERROR_TYPE
from serve.schemas import ErrorResponse

ERROR_TYPE_BY_STATUS = {status: key for key, status in STATUS_BY_ERROR_TYPE.items()}
MESSAGES = {
    "bad_request": "the request is not valid HTTP",
    "not_found": "there is no such path; GET /docs lists all of them",
    "method_not_allowed": "this path does not take this method; the Allow header lists its methods",
}


class WireResponse(JSONResponse):
    """JSON in which lone surrogates stay escaped.

    A request may hold half of an emoji as an escape, \\udXXX, which the response repeats. It has no
    UTF-8; what "backslashreplace" writes for it is also its escape in JSON.
    """

    def render(self, content: Any) -> bytes:  # noqa: ANN401 (anything that JSON can hold)
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


class RequestError(Exception):
    """Ends a request with the status of its error type."""

    def __init__(
        self,
        error_type: str,
        error: str,
        *,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.error_type = error_type
        self.status = STATUS_BY_ERROR_TYPE[error_type]
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})

    def response(self) -> Response:
        headers = self.headers
        if self.retry_after_seconds is not None:
            headers = {**headers, "Retry-After": str(self.retry_after_seconds)}
        if self.error_type == "unauthorized":
            headers = {**headers, "WWW-Authenticate": "Bearer"}  # RFC 9110 requires it with a 401
        body = ErrorResponse(error=str(self), error_type=self.error_type)
        return WireResponse(body.model_dump(), status_code=self.status, headers=headers)


async def on_http_error(_: Request, error: Exception) -> Response:
    """For what the web framework refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    error_type = ERROR_TYPE_BY_STATUS.get(error.status_code, "internal")
    message = MESSAGES.get(error_type, HTTPStatus(error.status_code).phrase.lower())
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"  # RequestMiddleware answers HEAD wherever GET is
    return RequestError(error_type, message, headers=headers).response()
