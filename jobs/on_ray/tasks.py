"""A TaskMap on Ray: each item is a task on whichever worker is free."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SECONDS_BETWEEN_LOOKS = 1.0
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerTasks:
    """Calls a function on items on workers; a lost worker's item is tried again."""

    num_cpus: float  # of a task; 0 means one task at a time, since nothing else would bound them
    look: Callable[[], None]  # is called every second meanwhile

    def __call__(
        self, function: Callable[[Item], Answer], items: Sequence[Item], /
    ) -> list[Answer]:
        """The answers in the order of `items`. Raises what the first failing task raises."""
        import ray

        def call(item: Any) -> Any:  # noqa: ANN401 (a TypeVar would be looked up in `jobs`)
            # Nested, so that it travels by value: a worker's path need not hold `jobs`.
            return function(item)

        task = ray.remote(num_cpus=self.num_cpus)(call)
        # More tasks than CPUs, so that one waits for each worker that becomes free, and a cluster
        # that grows sees that it should; not all of them, since each is bookkeeping for Ray.
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        max_running = max(2 * num_cpus, 1) if self.num_cpus else 1
        waiting = iter(enumerate(items))
        running: dict[ray.ObjectRef, int] = {}

        def start_more() -> None:
            for number, item in itertools.islice(waiting, max_running - len(running)):
                running[task.remote(item)] = number

        start_more()
        import ray.data  # here, while workers are busy: else the actors' start waits for it

        answers: dict[int, Answer] = {}
        while running:
            finished, _ = ray.wait(list(running), timeout=SECONDS_BETWEEN_LOOKS)
            for reference in finished:
                answers[running.pop(reference)] = ray.get(reference)
            start_more()
            self.look()
        return [answers[number] for number in range(len(items))]
