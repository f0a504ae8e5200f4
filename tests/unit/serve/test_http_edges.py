"""Requests as clients, probes and proxies really send them, over real HTTP and without Ray."""

import base64
import concurrent.futures
import gzip
import json
import socket
import time

import httpx
import pytest

from serve.settings import ServeSettings
from tests.local_server import LocalScorers, local_server

BODY = b'{"samples":{"text":"The sea rises."}}'
PATHS = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/info", "/metrics")


@pytest.fixture(scope="module")
def server():
    settings = ServeSettings(request_timeout_seconds=1.0, max_body_bytes=100_000)
    with local_server(settings, LocalScorers(settings)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened


def exchange(server, *segments, seconds=10):
    """Sends the segments one by one; returns what the server sends until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        for segment in segments:
            connection.sendall(segment)
            time.sleep(0.05)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return received


def parsed(received):
    """(status, headers, body) of one response."""
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def request(*headers, method="POST", target="/score", body=BODY):
    lines = [f"{method} {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQBAAAA")


@pytest.mark.parametrize("upgrade", ["h2c", "TLS/1.0", "something-new"])
@pytest.mark.parametrize("num_segments", [1, 2])
def test_an_offer_of_another_protocol_is_ignored_and_the_connection_kept(
    server, upgrade, num_segments
):
    first = request(H2C[0], f"Upgrade: {upgrade}", H2C[2])
    parts = [first] if num_segments == 1 else [first[: -len(BODY)], first[-len(BODY) :]]
    received = exchange(server, *parts, request("Connection: close"))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(b'"score"') == 2
    assert b"HTTP/1.1 4" not in received


KEY = base64.b64encode(b"0123456789abcdef").decode()


@pytest.mark.parametrize(
    ("method", "body", "version", "key", "answer"),
    [
        ("POST", BODY, "13", KEY, b"200 OK"),
        ("GET", BODY, "13", KEY, b"405 Method Not Allowed"),
        ("GET", b"", "8", KEY, b"405 Method Not Allowed"),
        ("GET", b"", "13", "x", b"405 Method Not Allowed"),
    ],
)
def test_an_offer_that_is_no_websocket_handshake_is_ignored(
    server, method, body, version, key, answer
):
    offer = ("Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Version: {version}")
    asked = request(*offer, f"Sec-WebSocket-Key: {key}", method=method, body=body)
    received = exchange(server, asked, request("Connection: close"))
    assert [received.startswith(b"HTTP/1.1 " + answer), received.count(b"HTTP/1.1 ")] == [True, 2]
    assert b"text/plain" not in received


def test_a_websocket_is_refused_at_once_in_the_error_shape(server):
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    started = time.monotonic()
    for target in ("/", "/score", "/nothing"):
        asked = request(
            *upgrade, f"Sec-WebSocket-Key: {KEY}", method="GET", target=target, body=b""
        )
        status, headers, body = parsed(exchange(server, asked))
        assert (status, headers["content-type"]) == (400, "application/json")
        assert "WebSocket" in json.loads(body)["error"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "malformed",
    [
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /score\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",  # TLS on a port without it
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    ],
)
def test_a_malformed_request_is_a_400_in_the_error_shape(server, malformed):
    status, headers, body = parsed(exchange(server, malformed))
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(body)["error_type"] == "bad_request"


@pytest.mark.parametrize("path", PATHS)
def test_head_is_answered_where_get_is(client, path):
    got, headed = client.get(path), client.head(path)
    assert (headed.status_code, headed.content) == (200, b"")
    assert headed.headers["content-type"] == got.headers["content-type"]
    assert headed.headers["content-length"]


def test_head_of_another_path_and_other_methods_are_refused_with_what_is_allowed(client):
    assert client.head("/nothing").status_code == 404
    assert client.head("/score").headers["allow"] == "POST"
    for method in ("PUT", "DELETE", "OPTIONS"):
        answer = client.request(method, "/info")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
        assert set(answer.json()) == {"error", "error_type"}


@pytest.mark.parametrize("path", ["/health/live/", "/info/", "/docs/", "/metrics//"])
def test_a_slash_at_the_end_of_a_path_changes_nothing(client, path):
    assert client.get(path).status_code == 200
    assert client.post("/score/", content=BODY).json()["results"][0]["score"] > 0


def test_compressed_bodies_are_scored_and_other_codings_refused(client):
    headers = {"Content-Encoding": "gzip"}
    [plain] = client.post("/score", content=BODY).json()["results"]
    [packed] = client.post("/score", content=gzip.compress(BODY), headers=headers).json()["results"]
    assert packed == plain
    bomb = client.post("/score", content=gzip.compress(b" " * 2_000_000), headers=headers)
    assert (bomb.status_code, bomb.json()["error_type"]) == (413, "too_large")
    refused = client.post("/score", content=BODY, headers={"Content-Encoding": "lzma"})
    assert (refused.status_code, refused.json()["error_type"]) == (415, "unsupported_encoding")
    assert refused.headers["accept-encoding"] == "gzip, deflate, br, zstd"


def test_a_body_that_never_ends_is_a_408_and_the_connection_is_closed(server):
    started = time.monotonic()
    received = exchange(server, request()[:-5])
    status, headers, body = parsed(received)
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["error_type"] == "timeout"
    assert time.monotonic() - started < 5
    assert server.service._num_unanswered == 0


def test_headers_that_never_end_are_a_408_and_an_idle_connection_is_closed(server, monkeypatch):
    monkeypatch.setattr("serve.http_protocol.HEADER_TIMEOUT_SECONDS", 0.3)
    status, _, body = parsed(exchange(server, b"POST /score HTTP/1.1\r\nHost: x\r\n"))
    assert (status, json.loads(body)["error_type"]) == (408, "timeout")
    assert exchange(server) == b""
    second = exchange(server, request(), b"POST /score HTTP/1.1\r\n")
    assert second.startswith(b"HTTP/1.1 200 OK")
    assert b"HTTP/1.1 408" in second


def test_no_short_request_waits_for_the_tokens_of_a_long_one():
    settings = ServeSettings()
    # Added tokens without end are tokenized as a whole, which other long texts are not.
    long = json.dumps({"samples": {"text": "<|user|>" * 100_000 + "x"}})
    with (
        local_server(settings, LocalScorers(settings)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        waiting = [pool.submit(client.post, "/score", content=long) for _ in range(4)]
        while running.service._num_unanswered < 4:
            time.sleep(0.01)
        assert client.post("/score", content=BODY).status_code == 200
        assert not all(answer.done() for answer in waiting)
        for answer in waiting:
            [result] = answer.result().json()["results"]
            assert (result["num_tokens"], result["truncated"]) == (1_024, True)
