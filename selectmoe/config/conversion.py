"""The settings of stage 0, conversion."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from selectmoe.config.checks import require_at_least
from selectmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Stage 0: convert an OLMoE model to a Select-MoE model."""

    stage: ClassVar[str] = "stage_0_convert"

    base: str
    """OLMoE checkpoint: a folder or hub name; with merge_weights also a Select-MoE."""
    save_path: str
    """Output folder for the Select-MoE checkpoint; it must be new or empty, and outside base."""
    verify: bool = False
    """Compare the logits of both models and save a parity report. Exits non-zero on a mismatch."""
    verify_only: bool = False
    """Verify the checkpoint that save_path already holds, without converting."""
    merge_weights: str | None = None
    """Weights of stage 1 to merge into the checkpoint: the output folder of the run or a file."""
    remote_code: bool = False
    """Add the model's code to the checkpoint, so that transformers loads it without this package,
    with trust_remote_code=True."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub to upload the checkpoint to; a new one is private."""
    quality_gate_init_mean: float | None = None
    """Mean of the quality gates' initial weights; null is the model's default."""
    quality_gate_init_std: float | None = None
    """Standard deviation of the quality gates' initial weights, at least 0; null is the model's
    default."""
    quality_gate_init_bias: float | None = None
    """Initial bias of the quality gates; with zero weights a gate is open to sigmoid(bias). Null is
    the model's default."""
    quality_gate_forced_open: bool | None = None
    """Force the quality gates open, so that the model computes exactly what base computes; null is
    the model's default."""
    trash_expert_mode: Literal["zero", "noise", "custom"] | None = None
    """Output of the trash expert: zeros, noise or a trained vector (custom); null is the
    model's default."""
    seed: int = 0
    """Random seed of the quality gates' initialization."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "quality_gate_init_std", "seed")
        verifies = self.verify or self.verify_only
        if self.merge_weights is not None and verifies:
            raise ConfigError(
                "verify compares with the tensors of the base, some of which stage 1 has changed: "
                "it cannot be combined with merge_weights"
            )
