"""Stage 2 in one process, without a cluster: threads that each have an engine of their own."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.model.free_memory import free_memory, require_weights_fit
from selectmoe.model.selector_files import find_selector
from selectmoe.selection.backends import Backend
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import ShardCounts, score_shard

# For torch, transformers and a batch's activations, beside the weights.
ENGINE_BYTES = 1_200_000_000
USABLE_MEMORY = 0.7  # share of the machine's
Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class InProcess:
    """A Runner: reads the corpus in this thread and scores on a few others."""

    def __init__(self, config: SelectConfig) -> None:
        self.config = config

    def start(self) -> None: ...

    def require_workers(self, backend: Backend) -> None:
        if not backend.is_remote:
            import torch

            on_gpu = torch.cuda.is_available()
            free, kind = free_memory(on_gpu=on_gpu)
            require_engine_fits(self.config, backend.model, on_gpu=on_gpu, free=free, kind=kind)

    def map_parts(self, look: Callable[[], None]) -> MapItems:
        def call_each(
            function: Callable[[Item], Result], items: Sequence[Item], /
        ) -> Iterator[Result]:
            for item in items:
                yield function(item)
                look()

        return call_each

    def map_over_scores(self, folder: RunFolder) -> MapItems:
        return map_in_threads

    def score(
        self, backend: Backend, shards: Sequence[Path], scored: Path
    ) -> Iterator[ShardCounts]:
        """Raises what the first failing shard raises, and starts no other after it."""
        num_threads = min(num_scoring_threads(self.config, backend), len(shards))
        logger.info("scoring %d shards on %d thread(s)", len(shards), num_threads)
        local = threading.local()

        def score(shard: Path) -> ShardCounts:
            return score_shard(local.scorer, shard, scored)

        with ThreadPoolExecutor(num_threads) as executor:
            _open_scorers(executor, num_threads, backend, local)
            futures = [executor.submit(score, shard) for shard in shards]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                executor.shutdown(cancel_futures=True)


def _open_scorers(
    executor: ThreadPoolExecutor, num_threads: int, backend: Backend, local: threading.local
) -> None:
    """Opens one scorer in each thread, where torch's number of threads is set, too.

    One after the other, and before any of them scores: while transformers loads a model, it changes
    torch's default dtype and initializers for the whole process.
    """
    one_at_a_time, all_open = threading.Lock(), threading.Barrier(num_threads)

    def open_scorer() -> None:
        try:
            with one_at_a_time:
                local.scorer = backend.open_scorer()
        except BaseException:
            all_open.abort()
            raise
        all_open.wait()  # so that no thread takes the task of another

    openings = [executor.submit(open_scorer) for _ in range(num_threads)]
    errors = [opening.exception() for opening in openings]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error


def num_scoring_threads(config: SelectConfig, backend: Backend) -> int:
    """As many engines as the machine has GPUs or CPUs for, and memory."""
    _, most = config.actor_bounds
    if most:
        return most
    if backend.is_remote:
        return config.shards_in_flight
    import torch

    if torch.cuda.is_available():
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * USABLE_MEMORY
    num_cpus = (os.cpu_count() or 1) // config.num_threads_per_actor
    return max(1, min(num_cpus, int(memory // engine_bytes(config, backend.model))))


def require_engine_fits(
    config: SelectConfig, model: str, *, on_gpu: bool, free: int, kind: str
) -> None:
    """Raises NotEnoughMemoryError where the weights of one engine need more than `free` bytes."""
    dtype = config.scoring.dtype or ("bfloat16" if on_gpu else "float32")
    num_parameters = find_selector(model, config.model_checkpoint_path).num_parameters()
    require_weights_fit(num_parameters, dtype, purpose="scoring", free=free, kind=kind)


def engine_bytes(config: SelectConfig, model: str) -> int:
    """About the memory that an engine on a CPU takes."""
    # There the model is float32, and its files are most likely bfloat16.
    return ENGINE_BYTES + 2 * find_selector(model, config.model_checkpoint_path).num_bytes()
