"""`python -m serve`: starts the service on an address of choice, with a Ray of its own.

On a Ray cluster that is running, it is deployed there.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from selectmoe.errors import ConfigError, SelectMoeError
from serve.local_ray import cluster_address, handle_signals, set_environment
from serve.settings import ADDRESS_VARIABLES, ServeSettings

DESCRIPTION = """\
Serve the scores of a Select-MoE model over HTTP (docs/serving.md). SELECTMOE_* environment
variables are its settings; serve/settings.py lists them.
"""
CHECKOUT = str(Path(__file__).resolve().parents[1])
HOST_VARIABLE, PORT_VARIABLE = ADDRESS_VARIABLES
NAME = "select-moe"
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s of most load balancers, which must close first


def main(arguments: Sequence[str] | None = None) -> None:
    """Returns when the service has been stopped by SIGTERM or Ctrl-C."""
    try:
        host, port = parse_address(arguments)
        settings = ServeSettings.from_environment()
        settings.require_key_for(host)
        _require_free(host, port)
        with contextlib.suppress(KeyboardInterrupt):
            _serve(settings, host, port)
    except SelectMoeError as error:
        sys.exit(f"error: {error}")


def parse_address(arguments: Sequence[str] | None) -> tuple[str, int]:
    """Host and port, from options, else the environment. Raises ConfigError for a bad port."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=DESCRIPTION)
    parser.add_argument(
        "--host",
        default=os.environ.get(HOST_VARIABLE) or "127.0.0.1",
        help=f"address to listen on; any but a loopback address requires SELECTMOE_API_KEY "
        f"(default: {HOST_VARIABLE}, else 127.0.0.1)",
    )
    parser.add_argument(
        "--port",
        default=os.environ.get(PORT_VARIABLE) or "8000",
        help=f"port to listen on (default: {PORT_VARIABLE}, else 8000)",
    )
    options = parser.parse_args(arguments)
    port = int(options.port) if options.port.isascii() and options.port.isdecimal() else 0
    if not 1 <= port <= 65_535:
        raise ConfigError(f"--port or {PORT_VARIABLE} must be 1 to 65535, got {options.port!r}")
    return options.host, port


def _require_free(host: str, port: int) -> None:
    """Serve would try for half a minute, and then show the trace of its proxy."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; see --host, --port") from None


def _serve(settings: ServeSettings, host: str, port: int) -> None:
    paths = [CHECKOUT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # replicas import serve and selectmoe
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Imported first: the variables are for the replicas, and would break handles in this process.
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve.application import build
    from serve.deployments import served_host

    set_environment()
    is_local = cluster_address() is None
    ray.init(
        address="local" if is_local else None,
        namespace="serve",
        runtime_env=None if is_local else {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False if is_local else None,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    handle_signals()  # after ray.init, which installs a SIGTERM handler that drops all requests
    try:
        options = HTTPOptions(host=host, port=port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS)
        serve.start(http_options=options)
        if served_host() != host:
            sys.exit(f"error: Serve runs on this cluster already, on {served_host()}")
        try:
            serve.run(build(settings), name=NAME, route_prefix="/")
        except RuntimeError:
            sys.exit(f"error: the service did not start: {_last_error()}")
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {settings.model_name} on {url}; Ctrl-C stops it", flush=True)
        while True:
            signal.pause()
    finally:
        if not is_local:
            serve.delete(NAME)
        ray.shutdown()  # with all processes of a local Ray


def _last_error() -> str:
    """The last line of what a deployment that failed reports, which is a traceback."""
    from ray import serve

    deployments = serve.status().applications[NAME].deployments.values()
    lines = [line for deployment in deployments for line in deployment.message.splitlines()]
    last = next((line for line in reversed(lines) if line and not line[0].isspace()), "no reason")
    error_class, _, message = last.partition(": ")
    return message if error_class.startswith("selectmoe.") else last


if __name__ == "__main__":
    main()
