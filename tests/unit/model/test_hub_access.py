import http.server
import socket
import threading
import time

import pytest

from selectmoe.model.hub_access import hub_answers


@pytest.fixture
def hub(monkeypatch):
    """Sets where the hub is; the tests' own settings keep away from the real one."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def set_address(port):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")

    return set_address


def test_whatever_the_hub_answers_is_an_answer(hub):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        hub(server.server_port)  # a handler without methods answers 501
        server.RequestHandlerClass.log_message = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            assert hub_answers() is True
        finally:
            server.shutdown()
            thread.join()


def test_nobody_there_is_known_at_once(hub):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub(unused.getsockname()[1])
        assert hub_answers() is False


def test_silence_is_waited_for_only_so_long(hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub(silent.getsockname()[1])
        started = time.perf_counter()
        assert hub_answers(timeout_seconds=0.3) is False
        assert time.perf_counter() - started < 5


def test_whoever_says_offline_is_not_asked_twice(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub(1)
    assert hub_answers() is False
