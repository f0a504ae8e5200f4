"""Decodes compressed request bodies (the header Content-Encoding) within the size limit."""

import functools
import zlib
from collections.abc import Callable

import pyarrow as pa

from serve.error_responses import RequestError

MAX_CODINGS = 2  # in one header; each is a pass over up to max_body_bytes


def decode_body(body: bytes, content_encoding: str, *, max_bytes: int) -> bytes:
    """Undoes the codings that the header names, the last one first.

    Raises RequestError: 415 for a coding that is not known, 413 as soon as more than `max_bytes`
    have come out, 422 for a body that is not in its coding.
    """
    codings = [name.strip().lower() for name in content_encoding.split(",")]
    codings = [name for name in codings if name not in ("", "identity")]
    unknown = [name for name in codings if name not in _DECODERS]
    if unknown or len(codings) > MAX_CODINGS:
        got = ascii(unknown[0][:40]) if unknown else f"{len(codings)} codings"
        raise RequestError(
            "unsupported_encoding",
            f"Content-Encoding must be one of {', '.join(ACCEPTED)} or absent, got {got}",
            headers={"Accept-Encoding": ", ".join(ACCEPTED)},  # RFC 9110, 15.5.16
        )
    for name in reversed(codings):
        try:
            body = _DECODERS[name](body, max_bytes + 1)
        except (zlib.error, EOFError, OSError):
            raise RequestError("validation", f"the body is not valid {name}") from None
        if len(body) > max_bytes:
            raise RequestError("too_large", f"the decoded body must be at most {max_bytes:,} bytes")
    return body


def _gunzip(body: bytes, max_bytes: int) -> bytes:
    """At most `max_bytes` of the content of all members."""
    decoded = bytearray()
    while body and len(decoded) < max_bytes:
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        decoded += member.decompress(body, max_bytes - len(decoded))
        if not member.eof and len(decoded) < max_bytes:
            raise EOFError
        body = member.unused_data
    return bytes(decoded)


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """RFC 9110 means zlib's format by deflate; some clients send the bare stream."""
    is_zlib = len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
    decoded = stream.decompress(body, max_bytes)
    if len(decoded) < max_bytes and (not stream.eof or stream.unused_data):
        raise EOFError
    return decoded


def _decompress(body: bytes, max_bytes: int, *, codec: str) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(body), codec) as stream:
        return bytes(stream.read(max_bytes))


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,  # its name before RFC 2616, which RFC 9110 keeps
    "deflate": _inflate,
    "br": functools.partial(_decompress, codec="brotli"),
    "zstd": functools.partial(_decompress, codec="zstd"),
}
ACCEPTED = tuple(name for name in _DECODERS if name != "x-gzip")
