"""MapItems on Ray: calls a function on each item as a Ray task."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jobs.on_ray.errors import user_mistake
from jobs.on_ray.session import start_ray
from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.corpus.shards import read_summary
from selectmoe.selection.run_folder import RunFolder

# Below this, threads of the driver finish before Ray has started: two cores read 10 M scores/s.
RAY_FROM_ROWS = 50_000_000
SECONDS_BETWEEN_LOOKS = 1.0
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class MapOnRay:
    """Calls a function on items on workers; the item of a lost worker is tried again."""

    num_cpus: float = 1  # of a task; 0 means one task at a time, since nothing else limits them
    look: Callable[[], None] = lambda: None  # called every second meanwhile, to report progress

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], /
    ) -> Iterator[Result]:
        """The results in the order of `items`; those that wait for an earlier one stay in Ray's
        object store. Raises what the first failing task raises."""
        import ray

        def call(item: Any) -> Any:  # noqa: ANN401 (a TypeVar would be looked up in `jobs`)
            # Nested, so that it travels by value: a worker's path need not hold `jobs`.
            return function(item)

        task = ray.remote(num_cpus=self.num_cpus)(call)
        # More tasks than CPUs, so that one waits for each worker that becomes free, and a cluster
        # that grows sees that it should; not all of them, since each is bookkeeping for Ray.
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        max_running = max(2 * num_cpus, 1) if self.num_cpus else 1
        waiting = iter(items)
        started: deque[ray.ObjectRef] = deque()  # the next to yield comes first
        running: set[ray.ObjectRef] = set()

        def start_more() -> None:
            for item in itertools.islice(waiting, max_running - len(running)):
                started.append(task.remote(item))
                running.add(started[-1])

        try:
            start_more()
            import ray.data  # here, while workers are busy: else the actors' start waits for it

            while started:
                if started[0] not in running:
                    yield result_of(started.popleft())
                    continue
                finished, _ = ray.wait(list(running), timeout=SECONDS_BETWEEN_LOOKS)
                running.difference_update(finished)
                start_more()
                self.look()
        finally:
            # After an error or Ctrl-C the others would write into a folder that is being deleted.
            if ray.is_initialized():
                for reference in running:
                    ray.cancel(reference, force=True)


def result_of(reference: Any) -> Any:  # noqa: ANN401 (what the function returned)
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        mistake = user_mistake(error)
        if mistake is None:
            raise
        raise mistake from error


def map_over_scores(folder: RunFolder) -> MapItems:
    """Threads, or Ray where `folder` has more scores than one machine reads fast."""
    summary = read_summary(folder.corpus)
    if summary is None or summary.num_read < RAY_FROM_ROWS:
        return map_in_threads
    import ray

    if not ray.is_initialized():  # re-selecting from the scores of another run
        start_ray()
    return MapOnRay()
