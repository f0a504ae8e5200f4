"""What runs on Ray's workers in the select job: shells around `selectmoe`, nothing more."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.config.selection import SelectConfig
from selectmoe.errors import SelectMoeError
from selectmoe.selection.run_folder import Scorer, ShardCounts

COUNTS = ("shard", "num_rows", "num_tokens", "num_truncated", "num_unscored", "seconds")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays for good, and looking it through for garbage over and over
    costs a fifth of their time. It is not looked through later either."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_engine(config: SelectConfig) -> Scorer:
    """The model in this process."""
    with without_garbage_collection():
        import torch

        from selectmoe.scoring.engine import ROW_LAYOUTS, ScoringEngine

    # One thread an actor, whatever the machine: a sum split over other threads rounds
    # otherwise, and the same corpus would not give the same bytes.
    torch.set_num_threads(config.num_threads_per_actor)
    settings = config.scoring
    return ScoringEngine.from_pretrained(
        str(config.model),
        weights=config.model_checkpoint_path,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        experts_implementation=settings.experts_implementation,
        formula=settings.formula,
        max_sequence_length=config.dataset.max_sequence_length,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        packer=ROW_LAYOUTS[settings.row_layout] if settings.row_layout else None,
    )


class ShardScorer:
    """An actor with one scorer; scores shards and skips those that have scores."""

    def __init__(
        self, open_scorer: Callable[[], Scorer], scored: Path, *, shards_in_flight: int
    ) -> None:
        self.failure: SelectMoeError | None = None
        try:
            self.scorer = open_scorer()
        except SelectMoeError as error:
            # Told by every call: Ray would try a failing start again, and print it in full.
            self.failure = error
        self.scored = scored
        # An engine stays in the thread that it was opened in: torch counts threads by thread.
        self.executor = ThreadPoolExecutor(shards_in_flight) if shards_in_flight > 1 else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        try:
            if self.failure is not None:
                raise self.failure
            counts = [asdict(entry) for entry in self.score(map(Path, map(str, batch["shard"])))]
        except SelectMoeError as error:
            # As a row, since an exception arrives at the driver as a text of stack traces.
            counts = [dict.fromkeys(COUNTS, 0) | {"failure": str(error)}]
        columns = {key: [entry[key] for entry in counts] for key in COUNTS}
        failures = [entry.get("failure", "") for entry in counts]
        return columns | {"pid": [os.getpid()] * len(counts), "failure": failures}

    def score(self, shards: Iterable[Path]) -> list[ShardCounts]:
        """A retry after a lost worker gets its whole block again, with finished shards in it."""
        from selectmoe.selection.run_folder import score_shard

        def score(shard: Path) -> ShardCounts:
            return score_shard(self.scorer, shard, self.scored)

        left = [shard for shard in shards if not (self.scored / shard.name).exists()]
        return list((self.executor.map if self.executor else map)(score, left))
