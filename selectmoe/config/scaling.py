"""The settings of the Ray workers of stages 1 and 3."""

from dataclasses import dataclass

from selectmoe.config.checks import require_at_least
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """How many Ray workers train, on which resources, and how their failures are handled."""

    num_workers: int | None = None
    """Number of training workers, each a process with a GPU or CPUs of its own; null is one per
    free GPU of the cluster, and 1 without GPUs."""
    use_gpu: bool | None = None
    """Train on GPUs; null uses them where the cluster has any."""
    num_cpus_per_worker: int = 1
    """CPUs reserved per worker; without a GPU, also its number of computing threads."""
    max_failures: int = 3
    """Worker failures tolerated before the run fails; each restarts from the last checkpoint."""
    num_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    storage_path: str | None = None
    """Folder or URL for checkpoints; null is the output folder of the run."""
    wait_for_nodes: bool = False
    """Wait for an autoscaling cluster to add the missing workers instead of failing at once."""

    def __post_init__(self) -> None:
        names = ("num_workers", "num_cpus_per_worker", "num_checkpoints")
        require_at_least(1, self, *names)
        require_at_least(0, self, "max_failures")


def require_workers_for(strategy: str, num_workers: int | None) -> None:
    """Raises ConfigError where one worker has nobody to share the shards with."""
    if strategy == "fsdp" and num_workers == 1:
        raise ConfigError(
            f"training.strategy=fsdp needs scaling.num_workers at least 2, got {num_workers}"
        )
