"""The Ray actor of stage 2, which scores shards of the corpus."""

import contextlib
import gc
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.cli.command_line import is_user_mistake, one_line
from selectmoe.errors import full_disk
from selectmoe.errors import one_line as cause_line
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


@dataclass(frozen=True, slots=True)
class ScoringFailure:
    """Why an actor scored no shard."""

    message: str
    disk_is_full: bool
    story: str
    """The stack of an error that is no mistake of the user; else empty."""

    @classmethod
    def of(cls, error: Exception) -> "ScoringFailure":
        full = full_disk(error)
        if full is not None:
            return cls(one_line(full), True, "")
        if is_user_mistake(error):
            return cls(one_line(error), False, "")
        story = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {cause_line(error)}", False, story)


class ShardScorer:
    """Scores shards, and skips those that have scores."""

    def __init__(
        self,
        open_scorer: Callable[[], SampleScorer],
        scored: Path,
        *,
        shards_in_flight: int,
        has_gpu: bool = False,
    ) -> None:
        self.failure: Exception | None = None
        try:
            with without_garbage_collection():
                if has_gpu:
                    from selectmoe.model.devices import require_gpu

                    require_gpu()
                self.scorer = open_scorer()
        except Exception as error:
            # Reported by every call: Ray would retry a constructor that fails, and log it in full.
            self.failure = error
        self.scored = scored
        # An engine stays in the thread that opened it: torch's number of threads is per thread.
        self.executor = ThreadPoolExecutor(shards_in_flight) if shards_in_flight > 1 else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Counts by column, and the failure of each row as JSON, empty where there is none."""
        try:
            if self.failure is not None:
                raise self.failure
            counts = [asdict(entry) for entry in self.score(map(Path, map(str, batch["shard"])))]
        except Exception as error:
            # As a row: Ray hides an exception behind advice about retries.
            failure = json.dumps(asdict(ScoringFailure.of(error)))
            counts = [
                dict.fromkeys(COUNTS, 0)
                | {"shard": "", "device": "", "dtype": "", "failure": failure}
            ]
        columns = {key: [entry[key] for entry in counts] for key in COUNTS}
        failures = [entry.get("failure", "") for entry in counts]
        return columns | {"failure": failures}

    def score(self, shards: Iterable[Path]) -> list[ShardCounts]:
        """A retry after a lost worker gets its whole block again, finished shards included."""

        def score(shard: Path) -> ShardCounts:
            return score_shard(self.scorer, shard, self.scored)

        left = [shard for shard in shards if not (self.scored / shard.name).exists()]
        return list((self.executor.map if self.executor else map)(score, left))
