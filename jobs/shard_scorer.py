"""What runs on Ray's workers in the select job: shells around `selectmoe`, nothing more."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.config import SelectConfig
from selectmoe.data.shards import CorpusSummary
from selectmoe.errors import SelectMoeError


def normalize_corpus(config: SelectConfig, folder: Path) -> CorpusSummary:
    """Reads the corpus into parquet shards; the summary is written last."""
    from selectmoe.data.readers import read_corpora
    from selectmoe.data.shards import keep_subset, write_shards

    rows = read_corpora(config.dataset.paths)
    if config.dataset.subset_ratio < 1:
        rows = keep_subset(rows, ratio=config.dataset.subset_ratio)
    return write_shards(rows, folder, rows_per_shard=config.rows_per_shard)


class ShardScorer:
    """An actor with one engine; scores a shard at a time and skips those that have scores."""

    def __init__(self, config: SelectConfig, scored: Path) -> None:
        import torch

        from selectmoe.scoring import ScoringEngine

        # One thread an actor, whatever the machine: a sum split over other threads rounds
        # otherwise, and the same corpus would not give the same bytes.
        torch.set_num_threads(config.num_threads_per_actor)
        settings = config.scoring
        self.failure: SelectMoeError | None = None
        try:
            self.engine = ScoringEngine.from_pretrained(
                str(config.model),
                weights=config.model_checkpoint_path,
                dtype=settings.dtype,
                attn_implementation=settings.attn_implementation,
                experts_implementation=settings.experts_implementation,
                formula=settings.formula,
                max_sequence_length=config.dataset.max_sequence_length,
                max_tokens_per_batch=settings.max_tokens_per_batch,
            )
        except SelectMoeError as error:
            # Told by every call: Ray would try a failing start again, and print it in full.
            self.failure = error
        self.scored = scored

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        from selectmoe.scored_shards import score_shard

        keys = ("shard", "num_rows", "num_tokens", "num_truncated", "num_unscored", "seconds")
        if self.failure is not None:
            # As a row, since an exception arrives at the driver as a text of stack traces.
            return {key: [0] for key in keys} | {
                "pid": [os.getpid()],
                "failure": [str(self.failure)],
            }
        counts = []
        for shard in batch["shard"]:
            path = Path(str(shard))
            # A retry after a lost worker gets its whole block again, with finished shards in it.
            if not (self.scored / path.name).exists():
                counts.append(asdict(score_shard(self.engine, path, self.scored)))
        return {key: [entry[key] for entry in counts] for key in keys} | {
            "pid": [os.getpid()] * len(counts),
            "failure": [""] * len(counts),
        }
