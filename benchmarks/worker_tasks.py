"""Runs independent parts of a benchmark in single-threaded processes."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
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
    """Results by task name; tasks start in the given order. A single worker is this process, since
    a new one would first import torch.

    on_done: called with the name and result of each finished task; None logs a line for each.
    """
    started = time.monotonic()
    results: dict[str, Any] = {}
    finished = run_here(tasks) if num_workers == 1 else run_in_workers(tasks, num_workers)
    for name, result in finished:
        results[name] = result
        if on_done:
            on_done(name, result)
            continue
        minutes = (time.monotonic() - started) / 60
        logger.info("%4.1f min: %s (%d of %d)", minutes, name, len(results), len(tasks))
    return results


def run_here(tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
    import torch

    torch.set_num_threads(1)  # the results depend on it in the last digits
    for name, (function, arguments) in tasks.items():
        yield name, function(*arguments)


def run_in_workers(tasks: Mapping[str, Task], num_workers: int) -> Iterator[tuple[str, Any]]:
    """Names and results in the order in which tasks finish."""
    # Two single-threaded workers are twice as fast as one with two threads for models this small.
    # Set before the workers start, since OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        names = {
            pool.submit(function, *arguments): name for name, (function, arguments) in tasks.items()
        }
        for future in as_completed(names):
            try:
                result = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            yield names[future], result
