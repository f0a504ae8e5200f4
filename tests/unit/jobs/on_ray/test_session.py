import json
import socket

import pytest
import ray

from jobs.on_ray import session as ray_session
from jobs.on_ray.session import ClusterError, start_ray


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch):
    with socket.socket() as listener:  # bound and not listening: nobody else can take the port
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
            start_ray()


def test_a_head_that_was_killed_is_not_taken_for_a_cluster(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray" / "ray_current_cluster"
    assert ray_session._head_on_this_machine() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        file.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert ray_session._head_on_this_machine() == file.read_text()
    assert ray_session._head_on_this_machine() is None
    assert not file.exists()  # else Ray's own actors would try it, for 40 seconds each time


def test_the_address_of_a_head_elsewhere_that_does_not_answer_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray_session, "CONNECT_TIMEOUT_SECONDS", 0.1)
    file = tmp_path / "ray" / "ray_current_cluster"
    file.write_text("192.0.2.77:6379")  # an address that the standards keep for examples
    assert ray_session._head_on_this_machine() is None
    assert file.exists()


def test_a_ray_that_does_not_start_is_tried_twice_and_told_in_one_line(
    tmp_path, monkeypatch, caplog
):
    """A folder whose path is too long for a socket: Ray raises a bare OSError."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    with pytest.raises(ClusterError) as refused:
        start_ray()
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("Ray did not start on this machine: ")
    assert "end old Ray processes with 'ray stop'" in message
    assert caplog.text.count("trying once more") == 1
    assert not ray.is_initialized()


def test_workers_of_a_cluster_get_the_variables_of_the_hubs_client(monkeypatch):
    for name in ray_session.HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HF_HOME", "/shared/hf"), ("HF_TOKEN", "secret"), ("HOME_PAGE", "x")):
        monkeypatch.setenv(name, value)
    variables = ray_session._variables_of_workers()
    assert variables.keys() == {"HF_HOME", "HF_TOKEN", "PYTHONPATH"}
    assert variables["HF_TOKEN"] == "secret"
    # What `ray job submit --runtime-env-json` sets already; Ray refuses to be given it twice.
    job = {"runtime_env": {"env_vars": {"HF_TOKEN": "secret", "PYTHONPATH": "/code"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert ray_session._variables_of_workers() == {"HF_HOME": "/shared/hf"}
