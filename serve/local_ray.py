"""What the Ray that `serve run` starts is told, since its command line cannot.

A cluster that runs already has its own environment: serve/rayservice.yaml sets the same there.
"""

import atexit
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

ENVIRONMENT = {
    # Our code never blocks its event loop, so Serve needs no second one beside it: a third more
    # empty requests a second, and a fifth less time for one (docs/serving.md).
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Twice a second is often enough to look after replicas; ten times take 3 % of a core, for good.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # What Serve itself has to say stands in its log files, and does not fill the terminal.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Serve's own errors in our shape.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy_errors.middlewares",
}
LOOK_SECONDS = 0.5
DRAIN_SECONDS = 60.0

logger = logging.getLogger(__name__)


def prepare_local_ray() -> None:
    """Before Ray starts; what the user has set stays. Does nothing outside of `serve run`."""
    if not is_serve_run():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray's own handler for SIGTERM kills the cluster with all that is being answered, and Ray sets
    # it when it starts. An alarm sets ours after that: only the main thread may, and it sleeps.
    signal.signal(signal.SIGALRM, _handle_signals_once_ray_runs)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
    atexit.register(_stop_looking)  # an interpreter that ends has no handler, and an alarm kills it


def is_serve_run() -> bool:
    """True in the process of `serve run`, whose standard error a person reads."""
    return Path(sys.argv[0]).name == "serve" and sys.argv[1:2] == ["run"]


def _handle_signals_once_ray_runs(_: int, __: FrameType | None) -> None:
    import ray

    if ray.is_initialized():
        _stop_looking()
        signal.signal(signal.SIGTERM, _finish_accepted_requests)
        signal.signal(signal.SIGINT, _finish_accepted_requests)


def _stop_looking() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _finish_accepted_requests(_: int, __: FrameType | None) -> None:
    """New requests get a 503, accepted ones their answers; then `serve run` ends as by Ctrl-C.

    Serve's own shutdown ends its proxies first, and with them what they have not answered.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and twice is impatience
    try:
        _drain()
    except Exception as error:
        logger.warning("some accepted requests may go unanswered: %s", type(error).__name__)
    raise KeyboardInterrupt


def _drain() -> None:
    from ray import serve

    for name in serve.status().applications:
        handle = serve.get_app_handle(name)
        handle.broadcast("drain").results(timeout_s=DRAIN_SECONDS)
