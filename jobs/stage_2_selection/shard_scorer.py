"""The Ray actor of stage 2, which scores shards of the corpus."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.errors import SelectMoeError
from selectmoe.selection.scored_shards import SampleScorer, ShardCounts, score_shard

COUNTS = tuple(ShardCounts.__dataclass_fields__)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports and loading: what they make lives as long as the process, and the collector's
    passes over it cost a fifth of their time. `freeze` spares it later passes, too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class ShardScorer:
    """Scores shards, and skips those that have scores."""

    def __init__(
        self, open_scorer: Callable[[], SampleScorer], scored: Path, *, shards_in_flight: int
    ) -> None:
        self.failure: SelectMoeError | None = None
        try:
            with without_garbage_collection():
                self.scorer = open_scorer()
        except SelectMoeError as error:
            # Reported by every call: Ray would retry a constructor that fails, and log it in full.
            self.failure = error
        self.scored = scored
        # An engine stays in the thread that opened it: torch's number of threads is per thread.
        self.executor = ThreadPoolExecutor(shards_in_flight) if shards_in_flight > 1 else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Counts by column, and the failure of each row, empty where there is none."""
        try:
            if self.failure is not None:
                raise self.failure
            counts = [asdict(entry) for entry in self.score(map(Path, map(str, batch["shard"])))]
        except SelectMoeError as error:
            # As a row, since an exception arrives at the driver as a text of stack traces.
            counts = [dict.fromkeys(COUNTS, 0) | {"shard": "", "failure": str(error)}]
        columns = {key: [entry[key] for entry in counts] for key in COUNTS}
        failures = [entry.get("failure", "") for entry in counts]
        return columns | {"failure": failures}

    def score(self, shards: Iterable[Path]) -> list[ShardCounts]:
        """A retry after a lost worker gets its whole block again, finished shards included."""

        def score(shard: Path) -> ShardCounts:
            return score_shard(self.scorer, shard, self.scored)

        left = [shard for shard in shards if not (self.scored / shard.name).exists()]
        return list((self.executor.map if self.executor else map)(score, left))
