"""On how many workers a training stage runs."""

from dataclasses import dataclass

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """On how many workers a training stage runs, and what happens when one is lost."""

    num_workers: int = 1
    """Training processes; each has its own GPU, or its own CPUs."""
    use_gpu: bool | None = None
    """Train on GPUs; null is where the cluster has any."""
    num_cpus_per_worker: int = 1
    """CPUs that a worker reserves and, without a GPU, computes on."""
    max_failures: int = 3
    """Lost workers after which the run ends; until then it goes on from its last checkpoint."""
    num_checkpoints: int = 2
    """Checkpoints to keep, the newest."""
    storage_path: str | None = None
    """Folder or URL of the checkpoints; null is the folder of the run."""
    wait_for_nodes: bool = False
    """Wait for workers that the cluster has not yet, as one that grows may, instead of refusing."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_cpus_per_worker", "num_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, f"scaling.{name}", "at least 1", value)
        failures = self.max_failures
        require(failures >= 0, "scaling.max_failures", "at least 0", failures)
