"""Runs independent parts of a benchmark in single-threaded worker processes."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

logger = logging.getLogger(__name__)

Task = tuple[Callable[..., Any], tuple[Any, ...]]
"""A module-level function, which a worker can import, and its arguments."""


def run_tasks(
    tasks: Mapping[str, Task],
    *,
    num_workers: int,
    on_done: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """Results by task name; tasks start in the given order.

    on_done: called with the name and result of each finished task; None logs a line for each.
    """
    # Two single-threaded workers are twice as fast as one with two threads for models this small.
    # Set before the workers start, since OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = {
            pool.submit(function, *arguments): name for name, (function, arguments) in tasks.items()
        }
        results: dict[str, Any] = {}
        for future in as_completed(names):
            name = names[future]
            try:
                results[name] = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if on_done:
                on_done(name, results[name])
                continue
            minutes = (time.monotonic() - started) / 60
            logger.info("%4.1f min: %s (%d of %d)", minutes, name, len(results), len(names))
    return results
