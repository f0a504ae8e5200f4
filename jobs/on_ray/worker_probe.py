"""Looks at a worker of the cluster before a run reads its corpus: its memory, and its GPU."""

from jobs.on_ray.map_items import result_of
from jobs.on_ray.session import ClusterError, alive_nodes
from selectmoe.model.free_memory import free_memory

Resources = dict[str, float]


def free_memory_of_worker(needed: Resources) -> tuple[int, str]:
    """Free bytes on one worker with these resources, and their kind, as `free_memory` gives them.

    needed: {"CPU": 1, "GPU": 1}. On a cluster that grows, waits for the first such worker.
    Raises DeviceError where torch cannot use the worker's GPU.
    """
    import ray

    def look() -> tuple[int, str]:
        # Nested, so that it travels by value: a worker's path need not hold `jobs`.
        return free_memory(on_gpu=needed.get("GPU", 0) > 0)

    task = ray.remote(num_cpus=needed.get("CPU", 0), num_gpus=needed.get("GPU", 0))(look)
    answer: tuple[int, str] = result_of(task.remote())
    return answer


def require_node(needed: Resources, *, setting: str) -> None:
    """Raises ClusterError where no node, now or after the cluster has grown, has these resources.

    setting: what asks for them, for the message: "num_threads_per_actor=64".
    """
    nodes = alive_nodes()
    if can_grow() or any(_fits(needed, node) for node in nodes):
        return
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    raise ClusterError(
        f"no node of the cluster has {_in_words(needed)}, which {setting} needs: the largest has "
        f"{largest} CPUs"
    )


def can_grow() -> bool:
    """True on a cluster with an autoscaler that may add nodes."""
    return bool(largest_resources(current=False))


def largest_resources(*, current: bool = True) -> Resources:
    """The resources of the cluster when its autoscaler has added every node that it may; `current`
    counts those that it has now, where there is no autoscaler."""
    import ray

    state = ray._private.state.state
    grown: Resources = {**(state.get_max_resources_from_cluster_config() or {})}
    now: Resources = ray.cluster_resources() if current else {}
    return {name: max(grown.get(name, 0), now.get(name, 0)) for name in {*grown, *now}}


def _fits(needed: Resources, node: object) -> bool:
    assert isinstance(node, dict)
    return all(node.get(name, 0) >= amount for name, amount in needed.items())


def _in_words(needed: Resources) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in needed.items())
