"""One shape for everything that is not a 200, and one table of statuses."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

STATUS_BY_ERROR_TYPE = {
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "validation": 422,
    "overloaded": 429,
    "internal": 500,
    "unavailable": 503,
}
ERROR_TYPE_BY_STATUS = {status: key for key, status in STATUS_BY_ERROR_TYPE.items()}


class ErrorResponse(BaseModel):
    """The body of every answer that is not a 200."""

    error: str = Field(description="What is wrong, in a sentence for a person.")
    error_type: str = Field(
        description="The same as a key for a program.",
        json_schema_extra={"enum": list(STATUS_BY_ERROR_TYPE)},
    )


class RequestError(Exception):
    """Ends a request with the status that the table has for its type."""

    def __init__(
        self, error_type: str, error: str, *, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(error)
        assert error_type in STATUS_BY_ERROR_TYPE
        self.error_type = error_type
        self.retry_after_seconds = retry_after_seconds

    def response(self) -> Response:
        headers = {}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.retry_after_seconds)
        if self.error_type == "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 asks for it beside a 401
        return error_response(self.error_type, str(self), headers=headers)


def error_response(
    error_type: str, error: str, *, headers: Mapping[str, str] | None = None
) -> Response:
    return json_response(
        {"error": error, "error_type": error_type},
        status=STATUS_BY_ERROR_TYPE[error_type],
        headers=headers,
    )


def http_error_response(status: int, *, headers: Mapping[str, str] | None = None) -> Response:
    """For what the web framework refuses by itself: unknown paths and methods."""
    error_type = ERROR_TYPE_BY_STATUS.get(status, "internal")
    sentences = {
        "not_found": "there is no such path; GET /docs lists what there is",
        "method_not_allowed": "this path does not take this method; the Allow header has its own",
    }
    sentence = sentences.get(error_type, HTTPStatus(status).phrase.lower())
    return error_response(error_type, sentence, headers=headers)


def json_response(
    content: Any,  # noqa: ANN401 (whatever JSON can hold)
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    # backslashreplace: half of an emoji, which a request may hold as an escape, has no UTF-8; in
    # JSON its escape is what Python writes for it here, \udXXX.
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(
        body.encode("utf-8", "backslashreplace"),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )
