"""The settings of a LoRA adapter, for stages 1 and 3."""

from dataclasses import dataclass

from selectmoe.config.checks import require, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """A LoRA adapter, in PEFT's words."""

    r: int = 16
    """Rank of the adapter's matrices."""
    lora_alpha: int = 32
    """Scaling numerator; the adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's inputs, in [0, 1)."""
    target_modules: tuple[str, ...] = ()
    """Names, or ends of names, of the modules to adapt, separated by commas; [] is the attention
    projections of the model. Fused expert weights (mlp.experts.gate_up_proj) are accepted without
    dropout."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "r", "lora_alpha")
        dropout = self.lora_dropout
        require(0 <= dropout < 1, "lora_dropout", "in [0, 1)", dropout)
