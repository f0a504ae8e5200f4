"""The protocol MapItems, for calling a function on items in any process, and a thread pool.

The builtin `map` satisfies it too, one item after the other; `jobs/on_ray/map_items.py` calls the
function on the workers of a cluster. Reading a corpus and selecting from its scores are written
against the protocol alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

MAX_THREADS = 4  # more wait for each other: with small items most of the time is Python's
CALLS_AHEAD = 2  # per thread: results that are not yet consumed stay in memory
Item = TypeVar("Item")
Result = TypeVar("Result")


class MapItems(Protocol):
    """Calls a function on every item and yields the results in the order of the items."""

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item], /
    ) -> Iterator[Result]: ...


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], /
) -> Iterator[Result]:
    """MapItems in this process, so that reading one item overlaps with computing on another."""
    num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as executor:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > CALLS_AHEAD * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
