"""Where we start Ray, it gets our settings, and a token without a file in the home folder."""

import os
import socket

import pytest

from serve.local_ray import ENVIRONMENT, cluster_address, set_environment


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home and a Ray folder of its own, and no settings."""
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in (*names, *ENVIRONMENT):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes ours away again
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_a_local_ray_gets_a_token_of_its_own(machine):
    set_environment()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert ENVIRONMENT.items() <= os.environ.items()
    assert not list((machine / ".ray").iterdir())


@pytest.mark.parametrize("given", ["file", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "cluster"])
def test_a_token_that_there_is_or_a_cluster_that_runs_is_left_alone(machine, monkeypatch, given):
    if given == "file":
        (machine / ".ray" / "auth_token").write_text("theirs")
    elif given == "cluster":
        monkeypatch.setenv("RAY_ADDRESS", "192.0.2.77:6379")
    else:
        monkeypatch.setenv(given, "theirs")
    set_environment()
    assert os.environ.get("RAY_AUTH_TOKEN", "theirs") == "theirs"


def test_a_cluster_is_found_where_its_head_answers(machine):
    assert cluster_address() is None
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (machine / "ray" / "ray_current_cluster").write_text(address)
        assert cluster_address() == address
    assert cluster_address() is None  # a killed head leaves its address behind
