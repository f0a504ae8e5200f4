"""Registers a trash expert: what a layer returns for a token whose quality gate is closed."""

import torch
from torch import Tensor, nn

from selectmoe import SelectMoeConfig, SelectMoeForCausalLM, register_trash_expert
from selectmoe.paths import EMBEDDED_SELECTOR


class ScaledCopy(nn.Module):
    """The token's own hidden state [B, T, H], times a learned scale."""

    def __init__(self, config: SelectMoeConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), 0.1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.scale


register_trash_expert("scaled_copy", ScaledCopy)  # before a model that uses it is loaded
model = SelectMoeForCausalLM.from_pretrained(
    EMBEDDED_SELECTOR, trash_expert_mode="custom", trash_expert_name="scaled_copy"
)
print([name for name, _ in model.named_parameters() if "trash_expert" in name])
