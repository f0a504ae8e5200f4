"""A cluster that was started without a token is joined without one, and the user is told."""

import concurrent.futures
import logging
import os

import grpc
import pytest

from selectmoe.cli.ray_token import (
    ClusterTokenError,
    answers_without_token,
    match_auth_mode,
    use_own_token,
)
from tests.ray_head import free_port


class ControlService(grpc.GenericRpcHandler):
    """Answers a ping as the control service of Ray does, with or without a token."""

    def __init__(self, *, needs_token):
        self.needs_token = needs_token

    def service(self, call):
        def answer(request, context):
            metadata = dict(context.invocation_metadata())
            if self.needs_token and "authorization" not in metadata:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        known = call.method == "/ray.rpc.NodeInfoGcsService/CheckAlive"
        return grpc.unary_unary_rpc_method_handler(answer) if known else None


@pytest.fixture
def cluster():
    """Starts control services; returns the address of each."""
    servers = []

    def start(*, needs_token):
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((ControlService(needs_token=needs_token),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a token, and no other setting."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes ours away again
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("made later")
    return tmp_path


def test_a_token_made_after_the_cluster_is_not_used_and_the_user_is_told(cluster, home, caplog):
    caplog.set_level(logging.INFO)
    address = cluster(needs_token=False)
    match_auth_mode(address)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    [line] = caplog.messages
    assert f"{address} was started without a token; ~/.ray/auth_token is not used" in line


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_of_the_environment_is_told_by_its_variable(
    cluster, home, caplog, monkeypatch, variable
):
    caplog.set_level(logging.INFO)
    (home / ".ray" / "auth_token").unlink()
    monkeypatch.setenv(variable, "abc")
    match_auth_mode(cluster(needs_token=False))
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert caplog.messages[0].endswith(f"{variable} is not used")


def test_a_cluster_with_a_token_gets_it(cluster, home, caplog):
    match_auth_mode(cluster(needs_token=True))
    assert "RAY_AUTH_MODE" not in os.environ
    assert caplog.messages == []


def test_without_any_token_nothing_changes(cluster, home):
    (home / ".ray" / "auth_token").unlink()
    match_auth_mode(cluster(needs_token=False))
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_demand_for_a_token_that_the_cluster_lacks_is_one_line_with_the_cure(
    cluster, home, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterTokenError, match="set RAY_AUTH_MODE=disabled, or restart"):
        match_auth_mode(cluster(needs_token=False))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    match_auth_mode(cluster(needs_token=False))


def test_an_address_where_nothing_answers_decides_nothing(home, monkeypatch):
    monkeypatch.setattr("selectmoe.cli.ray_token.PING_TIMEOUT_SECONDS", 0.2)
    assert not answers_without_token(f"127.0.0.1:{free_port()}")
    assert not answers_without_token("ray://a.invalid:10001")


def test_a_token_is_made_only_where_the_user_has_none(home):
    use_own_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    (home / ".ray" / "auth_token").unlink()
    use_own_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not (home / ".ray" / "auth_token").exists()
