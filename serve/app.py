"""POST /score on Ray Serve: `serve run serve.app:app` from the repository's root.

Settings are SELECTMOE_* variables, which settings.py lists; serve.yaml is the production form.
"""

from typing import Any

from ray import serve

from serve.deployments import Ingress, Scorer
from serve.local_ray import prepare_local_ray
from serve.settings import ServeSettings


def build(settings: ServeSettings) -> serve.Application:
    """The application: ingress replicas before scorer replicas."""
    resources: dict[str, Any] = {
        "num_cpus": settings.num_cpus_per_replica,
        "num_gpus": settings.num_gpus_per_replica,
    }
    if settings.max_replicas is None:
        scale: dict[str, Any] = {"num_replicas": settings.num_replicas}
    else:
        scale = {
            "autoscaling_config": {
                "min_replicas": settings.num_replicas,
                "max_replicas": settings.max_replicas,
                # An ingress keeps two batches at each busy scorer: both there means more to do.
                "target_ongoing_requests": 1.5,
            }
        }
    scorer = Scorer.options(ray_actor_options=resources, **scale).bind(settings)
    return Ingress.options(num_replicas=settings.num_ingress_replicas).bind(settings, scorer)


prepare_local_ray()
app = build(ServeSettings.from_environment())
