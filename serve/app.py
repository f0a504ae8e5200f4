"""POST /score on Ray Serve: `serve run serve.app:app` from the repository's root.

Settings are SELECTMOE_* variables, which settings.py lists; serve.yaml is the production form.
"""

import sys
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from selectmoe.errors import ConfigError
from serve.batching import CALLS_PER_REPLICA
from serve.deployments import Ingress, Scorer, served_host
from serve.local_ray import is_serve_run, prepare_local_ray
from serve.settings import ServeSettings

OPTIONS: dict[str, Any] = {
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    # Asked to end, a replica answers what it has accepted, for at most so long.
    "graceful_shutdown_timeout_s": 60,
    "graceful_shutdown_wait_loop_s": 0.2,
    # Requests are counted in /metrics, not written down one by one.
    "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
}
CALLS_PER_INGRESS = CALLS_PER_REPLICA + 2  # roll calls, which count as well


def build(settings: ServeSettings) -> serve.Application:
    """The application: ingress replicas before scorer replicas."""
    scorer = serve.deployment(
        name="Scorer",
        max_ongoing_requests=settings.num_ingress_replicas * CALLS_PER_INGRESS,
        ray_actor_options={
            "num_cpus": settings.num_cpus_per_replica,
            "num_gpus": settings.num_gpus_per_replica,
        },
        **_scale(settings),
        **OPTIONS,
    )(Scorer)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.num_ingress_replicas,
        # The queue has its own bound, which answers with 429; none of Serve's may come before it.
        max_ongoing_requests=100_000,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": 0},  # so that a machine's CPUs are the scorers'
        **OPTIONS,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, scorer.bind(settings))


def _scale(settings: ServeSettings) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.num_replicas}
    # An ingress keeps two batches at each busy scorer: both there means that there is more to do.
    autoscaling = {
        "min_replicas": settings.num_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": 1.5,
    }
    return {"autoscaling_config": autoscaling}


def settings_of_environment() -> ServeSettings:
    """A wrong one is one line, in the terminal of `serve run` or in `serve status`."""
    try:
        settings = ServeSettings.from_environment()
        settings.require_key_for(served_host())
    except ConfigError as error:
        if is_serve_run():
            sys.exit(f"error: {error}")
        raise RayServeException(str(error)) from error  # of no other does Serve leave out the trace
    return settings


prepare_local_ray()
app = build(settings_of_environment())
