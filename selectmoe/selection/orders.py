"""The orders in which rows are taken: by score, by answer length, by a sampling key.

An order gives each row a float32 priority that depends on the row and on the distribution of all
scores, not on the shard or the file that the row is in; ties are settled by row key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from selectmoe.selection.blocks import ScoreBlock, rows_by_scope
from selectmoe.selection.sampling_keys import RankTable, gumbel_noise, sampling_keys
from selectmoe.selection.top_k import Scope


class Order(Protocol):
    """Rows with a higher priority come first. Travels to the workers of a pass."""

    @property
    def unit(self) -> str:
        """What a priority is, by the name that a threshold has in the manifest."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the scored shards that are read beside `score`."""
        ...

    def priorities(self, block: ScoreBlock) -> np.ndarray:
        """float32 (N,), of all rows of a block; finite."""
        ...


@dataclass(frozen=True, slots=True)
class ByScore:
    """The highest score first."""

    unit: str = "score"
    columns: tuple[str, ...] = ()

    def priorities(self, block: ScoreBlock) -> np.ndarray:
        return block.scores


@dataclass(frozen=True, slots=True)
class ByAnswerTokens:
    """The longest answer first."""

    unit: str = "num_answer_tokens"
    columns: tuple[str, ...] = ("num_answer_tokens",)

    def priorities(self, block: ScoreBlock) -> np.ndarray:
        # Exact below 16,777,216 tokens.
        return block.numbers("num_answer_tokens").astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class BySamplingKey:
    """A random order, in which a higher score comes earlier the lower the temperature is."""

    seed: int
    temperature: float = 1.0
    ranks: Mapping[Scope, RankTable] | None = None
    """Distributions of scores, of the corpus or by dataset; None is a uniform random order."""
    unit: str = "sampling_key"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("dataset",) if self.ranks and None not in self.ranks else ()

    def priorities(self, block: ScoreBlock) -> np.ndarray:
        noise = gumbel_noise(block.key_hashes, seed=self.seed)
        return sampling_keys(self._ranks(block), noise, temperature=self.temperature)

    def _ranks(self, block: ScoreBlock) -> np.ndarray | None:
        if self.ranks is None:
            return None
        standardized = np.zeros(len(block.scores))
        for name, rows in rows_by_scope(block, self.ranks):
            standardized[rows] = self.ranks[name].standardized_ranks(block.scores[rows])
        return standardized
