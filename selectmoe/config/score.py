"""The settings of `selectmoe score`."""

from dataclasses import dataclass, field
from typing import ClassVar

from selectmoe.config.dataset import DatasetConfig
from selectmoe.config.engine import ScoringConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Scores of single rows, without a selection."""

    stage: ClassVar[str] = "score"

    model: str | None = None
    """Select-MoE folder or hub name; null is the selector in the package."""
    model_checkpoint_path: str | None = None
    """Stage 1's weights: the folder of its run, full_rank_weights.safetensors or an adapter."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    output: str | None = None
    """File for the scores, one JSON object per line; null prints them."""
