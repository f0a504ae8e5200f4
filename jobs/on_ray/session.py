"""Connects to the Ray cluster of the environment or of this machine, or starts a local one."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from selectmoe.cli.output_folder import in_uploaded_folder
from selectmoe.errors import SelectMoeError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0


def start_ray(*worker_modules: ModuleType) -> None:
    """Connects to a cluster or starts a local Ray, unless that has been done; logs its size.

    worker_modules: modules of `jobs` whose classes run on workers. They are pickled by value, since
    `jobs` is not in the wheel and may not be on a worker's path.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["PYTHONPATH"] = _python_path()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import ray

        for module in worker_modules:
            ray.cloudpickle.register_pickle_by_value(module)
        if ray.is_initialized():
            return
        _connect_or_start(ray)
    if threading.current_thread() is threading.main_thread():
        # `ray job stop` sends it. Ray's own handler ends the process with a stack of addresses;
        # handled like Ctrl-C, it ends with the line that says how to resume.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    resources = ray.cluster_resources()
    logger.info(
        "Ray is ready: %d CPUs, %d GPUs on %d node(s) (%.1f s)",
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        len(alive_nodes()),
        time.perf_counter() - started,
    )


def alive_nodes() -> list[Mapping[str, float]]:
    """The resources of each node of the cluster, used or free."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_free_gpus() -> int:
    """GPUs of the cluster that no other job holds."""
    import ray

    return int(ray.available_resources().get("GPU", 0))


def _connect_or_start(ray: ModuleType) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or _head_on_this_machine()
    if address is None:
        _use_a_token_of_our_own()
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    if not _answers(address):
        raise ClusterError(f"no Ray cluster answers at {address}, which RAY_ADDRESS names")
    # Workers of a running cluster have their own environment, and need the checkout's path unless
    # Ray unpacked the checkout for this job. Those of a local Ray inherit ours: without a runtime
    # environment the job can use Ray's idle workers, which saves two seconds.
    needs_path = not in_uploaded_folder()
    environment = {"env_vars": {"PYTHONPATH": _python_path()}} if needs_path else {}
    try:
        ray.init(runtime_env=environment, **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {address} requires a token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH where the token is not in ~/.ray/auth_token"
        ) from error


def _head_on_this_machine() -> str | None:
    """The address that `ray start` wrote on this machine, unless nothing answers there."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = file.read_text("utf-8").strip() if file.is_file() else ""
    if not address or _answers(address):
        return address or None
    if _is_of_this_machine(address):
        # A killed head leaves its address behind. Ray's actors would try it too: each query of the
        # state of another actor would take 40 seconds, and delay the end of a training run.
        with contextlib.suppress(OSError):
            file.unlink()
    return None


def _is_of_this_machine(address: str) -> bool:
    """True where a server could listen at that host here."""
    with socket.socket() as probe:
        try:
            probe.bind((address.rpartition(":")[0], 0))
        except OSError:
            return False
    return True


def _answers(address: str) -> bool:
    """True where something listens; also for an address with no port to try."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return True
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _use_a_token_of_our_own() -> None:
    """Secures a local Ray without writing a file.

    By default Ray writes a token into the home folder. From then on `ray start --head` requires
    it, and refuses `ray job submit`, which does not read it.
    """
    settings = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    has_file = (Path.home() / ".ray" / "auth_token").exists()
    if not has_file and not any(name in os.environ for name in settings):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class ClusterError(SelectMoeError, RuntimeError):
    """A Ray cluster does not answer, refuses the connection or lacks resources."""


def _python_path() -> str:
    """PYTHONPATH with this checkout first, so that workers find `selectmoe` uninstalled too."""
    checkout = str(Path(__file__).resolve().parents[2])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([checkout, *(path for path in given if path not in ("", checkout))])


def quiet_ray_data() -> None:
    """No progress bars, no execution plan, and only those errors that are raised."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It logs an actor's exception in a hundred lines before it raises it.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
