"""Reads the body of a request, within the limits of size and time."""

import asyncio

from starlette.requests import Request

from serve.content_coding import decode_body
from serve.error_responses import RequestError
from serve.settings import ServeSettings


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """The decoded body.

    Raises RequestError: 413 above max_body_bytes, sent or decoded; 408 if the body has not arrived
    within request_timeout_seconds; 415 or 422 for a content coding that cannot be decoded.
    """
    try:
        async with asyncio.timeout(settings.request_timeout_seconds):
            body = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise RequestError(
            "timeout",
            f"the body did not arrive within {settings.request_timeout_seconds:g} s",
            headers={"Connection": "close"},  # the rest of the body is no next request
        ) from None
    coding = ",".join(request.headers.getlist("content-encoding"))
    if not coding or not body:
        return body
    # In a thread: a body of some megabytes takes a few hundredths of a second.
    return await asyncio.to_thread(decode_body, body, coding, max_bytes=settings.max_body_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
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
