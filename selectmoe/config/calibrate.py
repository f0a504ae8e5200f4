"""The settings of `selectmoe calibrate`."""

from dataclasses import dataclass, field
from typing import ClassVar

from selectmoe.config.checks import require_at_least
from selectmoe.config.engine import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig:
    """Score a corpus and write calibration.json beside the weights that score it."""

    stage: ClassVar[str] = "calibrate"

    model: str | None = None
    """Selector: a Select-MoE (folder or hub name), a selector folder, or a base for which gates
    ship with the package or are given; null is the embedded selector."""
    model_checkpoint_path: str | None = None
    """Stage 1 weights: the output folder of a stage 1 run, full_rank_weights.safetensors, an
    adapter, or for a base the selector folder of its gates; null is the weights of the model."""
    data: tuple[str, ...] = ()
    """Corpora that the gates were trained on, or similar ones: files, folders, globs, URLs or
    hub:NAME[:split]; several are separated by commas."""
    scoring: EngineConfig = field(default_factory=EngineConfig)
    num_rows: int = 8_000
    """Maximum number of rows to score, chosen at random; at least 4,000 are recommended."""
    seed: int = 0
    """Random seed of the choice of rows."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_rows")
        require_at_least(0, self, "seed")
