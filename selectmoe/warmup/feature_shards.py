"""What gates would read of the rows of a warm-up and of their corrupted copies, computed by several
workers and kept in the folder of the run.

<run>/features/00000.safetensors    rows 0 to 15 and their copies
<run>/features/00001.safetensors    rows 16 to 31 and their copies, and so on

A shard is whole or absent, and does not depend on the number of workers: a resumed run computes
those that are missing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from safetensors.numpy import load_file, save

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.writers import whole_file
from selectmoe.errors import DataError, TrainingStoppedError, list_names
from selectmoe.records import Sample
from selectmoe.warmup.gate_features import FeatureReader
from selectmoe.warmup.step_batches import TrainingRows, make_copy

# Shape letters: N = rows, M = copies, L = layers that are read, H = hidden.

ROWS_PER_SHARD = 16
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, slots=True, eq=False)  # == on arrays gives no single answer
class RowFeatures:
    """What gates read of rows and of their copies: means over the answer tokens, float32."""

    rows_NLH: np.ndarray
    copies_MLH: np.ndarray
    parents_M: np.ndarray  # int64, the row of each copy

    def layers(self, positions: Sequence[int]) -> "RowFeatures":
        """Of some of the layers that were read, by their positions."""
        chosen = list(positions)
        return RowFeatures(self.rows_NLH[:, chosen], self.copies_MLH[:, chosen], self.parents_M)

    def some_rows(self, rows: np.ndarray) -> "RowFeatures":
        """Of some rows, by their positions in ascending order, and of their copies."""
        is_kept_M = np.isin(self.parents_M, rows)
        parents_M = np.searchsorted(rows, self.parents_M[is_kept_M])
        return RowFeatures(self.rows_NLH[rows], self.copies_MLH[is_kept_M], parents_M)

    def as_one_layer(self) -> "RowFeatures":
        """The layers side by side, as a single wide one: [N, 1, L * H]."""
        rows_N1F, copies_M1F = (
            part.reshape(len(part), 1, -1) for part in (self.rows_NLH, self.copies_MLH)
        )
        return RowFeatures(rows_N1F, copies_M1F, self.parents_M)


@dataclass(frozen=True, kw_only=True, slots=True)
class CopySettings:
    """Which corrupted copies the rows get."""

    kinds: tuple[str, ...]
    num_copies: int  # of each row, fewer where few kinds can change it
    seed: int

    def copies(self, rows: TrainingRows, index: int) -> list[Sample]:
        """The copies of one row; they depend on the seed and the row alone."""
        random = Random(f"{self.seed} {index}")
        made = (
            make_copy(rows.samples[index], rows.samples, kinds=self.kinds, random=random)
            for _ in range(self.num_copies)
        )
        return [copy for copy in made if copy is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureWork:
    """What the workers compute together, each its share of the shards."""

    run: Path
    rows: TrainingRows
    copies: CopySettings
    tokenizer: ChatTokenizer
    max_tokens_per_batch: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.rows.samples) // ROWS_PER_SHARD)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not on disk yet."""
        return [n for n in range(self.num_shards) if not shard_file(self.run, n).is_file()]

    def compute(self, number: int, reader: FeatureReader) -> int:
        """Writes one shard; returns the number of its tokens.

        Raises TrainingStoppedError, with the samples, where what the base computes is not finite.
        """
        start = number * ROWS_PER_SHARD
        indices = range(start, min(start + ROWS_PER_SHARD, len(self.rows.samples)))
        copies = [
            (index, copy) for index in indices for copy in self.copies.copies(self.rows, index)
        ]
        tokenized = [
            *(self.rows.tokenized[index] for index in indices),
            *self.tokenizer.tokenize([copy for _, copy in copies]),
        ]
        features_NLH = reader.read(tokenized, max_tokens_per_batch=self.max_tokens_per_batch)
        bad = ~np.isfinite(features_NLH).all(axis=(1, 2))
        if bad.any():
            ids = [tokenized[position].sample_id for position in np.flatnonzero(bad)]
            raise TrainingStoppedError(
                "the hidden states of the base are not finite numbers for the samples "
                f"{list_names(ids)}; try training.dtype=float32"
            )
        tensors = {
            "rows": features_NLH[: len(indices)],
            "copies": features_NLH[len(indices) :],
            "parents": np.array([index for index, _ in copies], np.int64),
        }
        file = shard_file(self.run, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as stream:
            stream.write(save({name: np.ascontiguousarray(t) for name, t in tensors.items()}))
        return sum(len(row.token_ids) for row in tokenized)


def compute_share(
    work: FeatureWork,
    reader: FeatureReader,
    *,
    rank: int,
    num_workers: int,
    on_progress: Callable[[int, float], None],
) -> None:
    """Computes this worker's share of the missing shards.

    on_progress: told the number of rows that are done, over all workers, and this worker's tokens
    per second.
    """
    started, num_tokens = time.perf_counter(), 0
    # By their numbers: the list of missing ones is another for a worker that begins later.
    for number in [n for n in work.missing() if n % num_workers == rank]:
        num_tokens += work.compute(number, reader)
        num_done = (work.num_shards - len(work.missing())) * ROWS_PER_SHARD
        seconds = time.perf_counter() - started
        on_progress(min(num_done, len(work.rows.samples)), num_tokens / seconds)


def load_features(work: FeatureWork) -> RowFeatures:
    """All shards, in the order of the rows; waits for those that other workers still compute.

    Raises DataError where no row has a copy.
    """
    while work.missing():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    shards = [load_file(shard_file(work.run, number)) for number in range(work.num_shards)]
    features = RowFeatures(
        *(
            np.concatenate([shard[name] for shard in shards])
            for name in ("rows", "copies", "parents")
        )
    )
    if not len(features.parents_M):
        raise DataError(
            f"none of {len(features.rows_NLH)} samples can be corrupted by "
            f"{', '.join(work.copies.kinds)}; first: {work.rows.samples[0].sample_id}"
        )
    return features


def shard_file(run: Path, number: int) -> Path:
    return run / "features" / f"{number:05d}.safetensors"
