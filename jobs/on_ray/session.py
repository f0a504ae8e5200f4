"""Connects to the Ray cluster of the environment or of this machine, or starts a local one."""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from selectmoe.cli.output_folder import in_uploaded_folder
from selectmoe.cli.ray_token import match_auth_mode, use_own_token
from selectmoe.errors import SelectMoeError, StorageError, full_disk, one_line

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0
# What the hub's client reads: where its cache, token and server are, and whether it is offline.
HUB_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT",
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip
START_REMEDY = (
    "free memory or CPUs, end old Ray processes with 'ray stop', or name a running cluster in "
    "RAY_ADDRESS; its log files are in session_latest/logs of its folder ($RAY_TMPDIR/ray or "
    "/tmp/ray)"
)


def start_ray(*worker_modules: ModuleType) -> None:
    """Connects to a cluster or starts a local Ray, unless that has been done; logs its size.

    worker_modules: modules of `jobs` whose classes run on workers. They are pickled by value, since
    `jobs` is not in the wheel and may not be on a worker's path.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Errors of tasks that nobody waits for any more, as after Ctrl-C; those that matter are raised.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
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
        use_own_token()
        # An actor of two CPU seconds that watches for nodes being taken away; here is only one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        local = {"address": "local", "include_dashboard": False, **quiet}
        _init_or_retry(ray, f"Ray did not start on this machine: {{}}; {START_REMEDY}", **local)
        return
    if not _answers(address):
        raise ClusterError(f"no Ray cluster answers at {address}, which RAY_ADDRESS names")
    match_auth_mode(address)
    variables = _variables_of_workers()
    environment = {"env_vars": variables} if variables else {}
    refusal = f"the Ray cluster at {address} did not accept the connection: {{}}"
    try:
        _init_or_retry(ray, refusal, runtime_env=environment, **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {address} requires a token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH where the token is not in ~/.ray/auth_token"
        ) from error


def _variables_of_workers() -> dict[str, str]:
    """Environment variables of the driver that workers of a running cluster need, which have an
    environment of their own: the checkout's path, unless Ray unpacked the checkout for this job,
    and those of the hub's client.

    Workers of a local Ray inherit ours: without a runtime environment the job can use Ray's idle
    workers, which saves two seconds.
    """
    variables = {name: os.environ[name] for name in HUB_VARIABLES if name in os.environ}
    if not in_uploaded_folder():
        variables["PYTHONPATH"] = _python_path()
    # Ray refuses a variable that the submitted job sets, too.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables.items() if name not in given}


def _init_or_retry(ray: ModuleType, refusal: str, **settings: object) -> None:
    """`ray.init`, once more where it fails: a busy machine may exceed Ray's time limit of 30 s.

    refusal: the message of the ClusterError, with {} for the reason.
    """
    for is_last in (False, True):
        try:
            ray.init(**settings)
            return
        except ray.exceptions.AuthenticationError:
            raise
        except Exception as error:  # Ray raises bare exceptions here
            with contextlib.suppress(Exception):
                ray.shutdown()
            full = full_disk(error)
            if full is not None:
                raise StorageError(
                    f"{full.filename or _ray_folder()}: {full.strerror}; Ray cannot start there, "
                    "set RAY_TMPDIR to a folder on a disk with free space"
                ) from error
            message = refusal.format(one_line(error))
            if is_last:
                raise ClusterError(message) from error
            logger.warning("%s; trying once more", message)


def _ray_folder() -> Path:
    """Where Ray keeps its sockets and log files."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def _head_on_this_machine() -> str | None:
    """The address that `ray start` wrote on this machine, unless nothing answers there."""
    file = _ray_folder() / "ray_current_cluster"
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
