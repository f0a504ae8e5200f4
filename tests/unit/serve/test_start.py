"""`python -m serve`: host and port by option or variable; a wrong one is refused in one line."""

import socket
import sys

import pytest

from serve.__main__ import main, parse_address
from tests.ray_head import free_port


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("SELECTMOE_HOST", "SELECTMOE_PORT", "SELECTMOE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_an_option_wins_over_the_variable_and_that_over_the_default(monkeypatch):
    assert parse_address([]) == ("127.0.0.1", 8000)
    monkeypatch.setenv("SELECTMOE_HOST", "::1")
    monkeypatch.setenv("SELECTMOE_PORT", "8001")
    assert parse_address([]) == ("::1", 8001)
    assert parse_address(["--host", "localhost", "--port", "8002"]) == ("localhost", 8002)


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize("port", ["0", "65536", "-1", "eighty", "8000.0"])
def test_a_port_that_is_none_is_refused(port):
    assert refusal(f"--port={port}") == (
        f"error: --port or SELECTMOE_PORT must be 1 to 65535, got {port!r}"
    )


def test_an_address_beyond_this_machine_requires_a_key():
    assert refusal("--host", "0.0.0.0").startswith(
        "error: SELECTMOE_API_KEY must be set to serve on 0.0.0.0"
    )


def test_an_address_that_is_taken_or_none_of_this_machine_is_refused_before_ray_starts(monkeypatch):
    monkeypatch.setenv("SELECTMOE_API_KEY", "key")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal("--port", str(port))
        assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    line = refusal("--host", "192.0.2.77", "--port", str(free_port()))
    assert line.startswith("error: cannot listen on 192.0.2.77:")


def test_serve_run_refuses_the_variables_that_it_would_ignore(monkeypatch):
    from serve.app import load_settings

    monkeypatch.setattr(sys, "argv", ["/bin/serve", "run", "serve.app:app"])
    monkeypatch.setenv("SELECTMOE_PORT", "8001")
    with pytest.raises(SystemExit, match="SELECTMOE_PORT has no effect on `serve run`; start"):
        load_settings()
