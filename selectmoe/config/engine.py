"""How the model is run and its gates are averaged."""

from dataclasses import dataclass
from typing import Literal

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How the model is run and its gates are averaged."""

    formula: Literal[
        "original",
        "answer_probability",
        "answer_margin",
        "answer_margin_second_half",
        "answer_margin_last",
    ] = "answer_margin"
    """Which tokens and layers a score averages, and whether as probabilities or margins."""
    max_tokens_per_batch: int | None = None
    """Tokens of one forward pass, padding included; null is 4,096 on a CPU, and on a GPU what its
    free memory takes, at most 65,536."""
    row_layout: Literal["padded", "packed"] | None = None
    """How rows lie in a batch: padded to the longest, or packed end to end in a forward pass made
    for scoring; null is packed on a GPU (Ampere or newer) and padded elsewhere."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the model's numbers; null is bfloat16 on a GPU and float32 on a CPU."""
    attn_implementation: str = "sdpa"
    """eager, sdpa or flash_attention_2; another than sdpa means padded rows."""
    experts_implementation: str | None = None
    """eager, grouped_mm or batched_mm, of padded rows; null is eager on a CPU and grouped_mm on a
    GPU. One that is given means padded rows."""

    def __post_init__(self) -> None:
        tokens = self.max_tokens_per_batch
        require(tokens is None or tokens >= 1, "scoring.max_tokens_per_batch", "at least 1", tokens)
        if self.row_layout == "packed":
            for key, unset in (("attn_implementation", "sdpa"), ("experts_implementation", None)):
                rule = f"{unset or 'null'} with scoring.row_layout=packed, which has its own"
                value = getattr(self, key)
                require(value == unset, f"scoring.{key}", rule, value)
