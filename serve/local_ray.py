"""Sets the environment of Ray where we start it, and signal handlers that answer accepted requests.

A running cluster has its own environment: serve/rayservice.yaml sets the same variables there.
"""

import atexit
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from selectmoe.cli.ray_token import ClusterTokenError, match_auth_mode, use_own_token

ENVIRONMENT = {
    # Our code never blocks its event loop, so Serve needs no separate loop: 30 % more empty
    # requests a second, 20 % less latency (docs/serving.md).
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Checking replicas ten times a second, the default, takes 3 % of a core even when idle.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Serve's own log goes to files only, not to the terminal.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Gives Serve's own errors the shape of ours.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy_errors.middlewares",
}
POLL_SECONDS = 0.5
DRAIN_SECONDS = 60.0
CONNECT_TIMEOUT_SECONDS = 5.0

logger = logging.getLogger(__name__)


def prepare_local_ray() -> None:
    """Call before Ray starts. Keeps variables that are set; does nothing outside `serve run`."""
    if not is_serve_run():
        return
    try:
        set_environment()
    except ClusterTokenError as error:
        sys.exit(f"error: {error}")
    # On start Ray installs a SIGTERM handler that kills the cluster and every request in flight.
    # A timer installs ours afterwards: only the main thread may do so, and `serve run` blocks it.
    signal.signal(signal.SIGALRM, _install_handlers_once_ray_runs)
    signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)
    atexit.register(_stop_polling)  # the signal would kill an interpreter that is shutting down


def set_environment() -> None:
    """Call before Ray starts, and after `ray.serve` was imported: its processes read the variables
    anew, and in this one they would break handles outside an event loop.

    Raises ClusterTokenError, see match_auth_mode.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster_address()
    if address is None:
        use_own_token()
    else:
        match_auth_mode(address)


def cluster_address() -> str | None:
    """The running Ray cluster that Ray would connect to; None where it would start one."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    named = os.environ.get("RAY_ADDRESS", "")
    address = named or (file.read_text("utf-8").strip() if file.is_file() else "")
    host, _, port = address.rpartition(":")
    if not named and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_SECONDS).close()
        except OSError:  # a killed head leaves its address behind
            return None
    return address or None


def is_serve_run() -> bool:
    """Whether this is the process of `serve run`, whose stderr is a user's terminal."""
    return Path(sys.argv[0]).name == "serve" and sys.argv[1:2] == ["run"]


def _install_handlers_once_ray_runs(_: int, __: FrameType | None) -> None:
    import ray

    if ray.is_initialized():
        _stop_polling()
        handle_signals()


def handle_signals() -> None:
    """SIGTERM and Ctrl-C answer what is accepted, then raise KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, _finish_accepted_requests)
    signal.signal(signal.SIGINT, _finish_accepted_requests)


def _stop_polling() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _finish_accepted_requests(_: int, __: FrameType | None) -> None:
    """Answers accepted requests and refuses new ones with 503, then stops as Ctrl-C does.

    Serve's own shutdown stops its proxies first, and drops the requests in flight.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the shutdown has begun
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
    try:
        from ray import serve

        for name in serve.status().applications:
            serve.get_app_handle(name).broadcast("drain").results(timeout_s=DRAIN_SECONDS)
    except Exception as error:
        logger.warning("some accepted requests may remain unanswered: %s", type(error).__name__)
    raise KeyboardInterrupt
