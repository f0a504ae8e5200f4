"""Independent parts of a benchmark, spread over processes of one thread each."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

logger = logging.getLogger(__name__)

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, which a new process can import, and its arguments."""


def run_tasks(
    tasks: Mapping[str, Task],
    *,
    num_workers: int,
    on_done: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """The results by the tasks' names; the tasks begin in their order.

    on_done: gets the name and the result of each; None logs a line for each.
    """
    # Two small models side by side take half the time of two threads on one. Set before the
    # workers start, since OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = {
            pool.submit(function, *arguments): name for name, (function, arguments) in tasks.items()
        }
        found = {}
        for future in as_completed(names):
            try:
                found[names[future]] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if on_done:
                on_done(names[future], found[names[future]])
                continue
            minutes = (time.monotonic() - started) / 60
            logger.info("%4.1f min: %s (%d of %d)", minutes, names[future], len(found), len(names))
    return found
