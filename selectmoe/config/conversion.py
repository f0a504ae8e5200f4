"""The settings of stage 0."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Stage 0: an OLMoE checkpoint becomes a Select-MoE."""

    stage: ClassVar[str] = "stage_0_convert"

    base: str
    """OLMoE folder or hub name."""
    save_path: str
    """Folder of the new checkpoint: new or empty, and outside base."""
    verify: bool = False
    """Compare the logits of both models and store the parity report."""
    verify_only: bool = False
    """The same for the checkpoint that save_path already holds, converting nothing."""
    quality_gate_init_mean: float | None = None
    """Mean of the gates' first weights; null is the model's own default."""
    quality_gate_init_std: float | None = None
    """Their standard deviation, at least 0; null is the model's own default."""
    quality_gate_init_bias: float | None = None
    """What opens them: good is sigmoid(bias) at weights of 0; null is the model's own default."""
    quality_gate_forced_open: bool | None = None
    """Take good as 1 whatever the gates say: the model then computes what base computes."""
    trash_expert_mode: Literal["zero", "noise", "custom"] | None = None
    """What the trash expert returns; null is the model's own default."""
    seed: int = 0
    """Of the gates' first weights."""

    def __post_init__(self) -> None:
        deviation = self.quality_gate_init_std
        valid = deviation is None or deviation >= 0
        require(valid, "quality_gate_init_std", "at least 0", deviation)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
