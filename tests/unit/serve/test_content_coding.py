"""Compressed bodies are decoded within the limit; what cannot be decoded says so."""

import gzip
import zlib

import pyarrow as pa
import pytest

from serve.content_coding import ACCEPTED, decode_body
from serve.error_responses import RequestError

BODY = b'{"samples": {"text": "The sea rises."}}' * 50


def compressed(body, codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(body)
    return sink.getvalue().to_pybytes()


def bare_deflate(body):
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(body) + stream.flush()


ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZIP": gzip.compress,
    "deflate": zlib.compress,
    "identity, deflate": bare_deflate,
    "br": lambda body: compressed(body, "brotli"),
    "zstd": lambda body: compressed(body, "zstd"),
    "gzip, br": lambda body: compressed(gzip.compress(body), "brotli"),
    "identity": bytes,
    "": bytes,
}


@pytest.mark.parametrize("coding", ENCODERS)
def test_a_body_comes_out_as_it_went_in(coding):
    encoded = ENCODERS[coding](BODY)
    assert decode_body(encoded, coding, max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize("coding", [name for name in ENCODERS if name not in ("identity", "")])
def test_a_body_that_decodes_to_more_than_the_limit_is_refused_while_it_is_decoded(coding):
    bomb = ENCODERS[coding](b"\0" * 30_000_000)
    with pytest.raises(RequestError, match="at most 1,000 bytes") as refusal:
        decode_body(bomb, coding, max_bytes=1_000)
    assert refusal.value.status == 413


def test_every_member_of_a_gzip_body_is_read_and_counts():
    members = gzip.compress(BODY) + gzip.compress(b"") + gzip.compress(BODY)
    assert decode_body(members, "gzip", max_bytes=10_000) == BODY * 2
    with pytest.raises(RequestError, match="at most"):
        decode_body(members, "gzip", max_bytes=len(BODY) + 1)


@pytest.mark.parametrize("coding", ACCEPTED)
@pytest.mark.parametrize("damage", ["cut", "more", "other"])
def test_a_body_that_is_not_in_its_coding_is_refused_by_name(coding, damage):
    encoded = ENCODERS[coding](BODY)
    damaged = {"cut": encoded[:-3], "more": encoded + b"more", "other": BODY}[damage]
    with pytest.raises(RequestError, match=f"the body is not valid {coding}") as refusal:
        decode_body(damaged, coding, max_bytes=100_000)
    assert refusal.value.status == 422


@pytest.mark.parametrize("coding", ["lzma", "compress", "gzip, lzma", "gzip, gzip, gzip", "*"])
def test_other_codings_are_a_415_that_lists_what_is_accepted(coding):
    with pytest.raises(RequestError, match="Content-Encoding must be one of") as refusal:
        decode_body(BODY, coding, max_bytes=100_000)
    response = refusal.value.response()
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip, deflate, br, zstd"
