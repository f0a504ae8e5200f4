"""Builds the Ray Serve application from its settings."""

from typing import Any

from ray import serve

from serve.batching import CALLS_PER_REPLICA
from serve.deployments import Ingress, Scorer
from serve.settings import ServeSettings

OPTIONS: dict[str, Any] = {
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    # A replica that is told to stop first answers what it has accepted, for at most this long.
    "graceful_shutdown_timeout_s": 60,
    "graceful_shutdown_wait_loop_s": 0.2,
    # /metrics counts requests; nothing logs them one by one.
    "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
}
CALLS_PER_INGRESS = CALLS_PER_REPLICA + 2  # health checks count, too


def build(settings: ServeSettings) -> serve.Application:
    """The application: ingress replicas that send batches to scorer replicas."""
    scorer = serve.deployment(
        name="Scorer",
        max_ongoing_requests=settings.num_ingress_replicas * CALLS_PER_INGRESS,
        ray_actor_options={
            "num_cpus": settings.num_cpus_per_replica,
            "num_gpus": settings.num_gpus_per_replica,
        },
        **_scaling(settings),
        **OPTIONS,
    )(Scorer)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.num_ingress_replicas,
        # Our queue has its own limit, which answers with 429; Serve's limits must not come first.
        max_ongoing_requests=100_000,
        max_queued_requests=-1,
        ray_actor_options={"num_cpus": 0},  # leaves all CPUs of a machine to the scorers
        **OPTIONS,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, scorer.bind(settings))


def _scaling(settings: ServeSettings) -> dict[str, Any]:
    if settings.max_replicas is None:
        return {"num_replicas": settings.num_replicas}
    # A busy scorer has two batches in flight: above 1.5 on average, more scorers would help.
    autoscaling = {
        "min_replicas": settings.num_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": 1.5,
    }
    return {"autoscaling_config": autoscaling}
