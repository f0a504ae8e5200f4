"""A quiet Ray: the cluster that the environment names, one that runs here, or one of our own."""

import logging
import os
import time
import warnings
from pathlib import Path
from types import ModuleType

from jobs.output_folder import in_uploaded_folder

logger = logging.getLogger(__name__)


def start_ray(*worker_modules: ModuleType) -> None:
    """Connects to a cluster or starts a local Ray; says which, and how long it took.

    worker_modules: modules of `jobs` whose classes run on workers. They travel with the pickles,
    since `jobs` is in no wheel and a worker's path need not hold the checkout.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import ray

        for module in worker_modules:
            ray.cloudpickle.register_pickle_by_value(module)
        if not ray.is_initialized():
            ray.init(
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False,
                runtime_env={} if in_uploaded_folder() else {"env_vars": _python_path()},
            )
    resources = ray.cluster_resources()
    logger.info(
        "Ray is ready: %d CPUs, %d GPUs on %d node(s) (%.1f s)",
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        sum(node["Alive"] for node in ray.nodes()),
        time.perf_counter() - started,
    )


def _python_path() -> dict[str, str]:
    """Lets workers import `selectmoe` from this checkout, also where it is not installed."""
    checkout = str(Path(__file__).resolve().parent.parent)
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{checkout}{os.pathsep}{given}" if given else checkout}
