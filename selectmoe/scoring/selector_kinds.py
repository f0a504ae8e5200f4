"""The two kinds of selectors, as the scoring engine sees them.

Shape letters: L = gates, B = rows, T = tokens.
"""

from typing import Protocol

import torch
from torch import Tensor

from selectmoe.config.engine import EngineConfig
from selectmoe.errors import ConfigError
from selectmoe.model.attached_gates import AttachedGates
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.scoring.formulas import ScoreFormula, good_margins
from selectmoe.scoring.packed import PackedScorer, choose_layout


class Selector(Protocol):
    """A language model with quality gates, ready to score."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int:
        """Number of layers with a gate, which is L."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; None where it does not say."""
        ...

    def margins(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Good logit minus trash logit at every token of a batch that is padded on the right:
        float32 [L, B, T]."""
        ...

    def packed_scorer(self, config: EngineConfig, formula: ScoreFormula) -> PackedScorer | None:
        """What scores packed batches; None where batches are padded."""
        ...


class SelectMoeSelector:
    """A Select-MoE, whose gates are inside the model."""

    def __init__(self, model: SelectMoeModel) -> None:
        """`model` is put into evaluation mode and loses the experts of its last layer."""
        self.model = model.eval()
        model.skip_last_experts()
        self.device: torch.device = model.device
        self.num_layers: int = model.config.num_hidden_layers
        self.max_positions: int | None = model.config.max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def margins(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        # No attention mask: under a causal mask padding on the right is seen by no real token.
        decoded = self.model(input_ids=token_ids_BT, use_cache=False, output_quality_logits=True)
        return good_margins(torch.stack(decoded["quality_logits"]))

    def packed_scorer(self, config: EngineConfig, formula: ScoreFormula) -> PackedScorer | None:
        if choose_layout(config, self.device) != "packed":
            return None
        budget = config.max_tokens_per_batch
        return PackedScorer(self.model, formula, max_tokens_per_batch=budget)


class GatedBaseSelector:
    """Any base, with gates attached."""

    def __init__(self, attached: AttachedGates) -> None:
        """The base is cut at its last gate."""
        attached.cut()
        self.attached = attached
        self.device = attached.device
        self.dtype = attached.dtype
        self.num_layers = attached.num_layers
        self.max_positions = attached.max_positions

    def margins(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        mask_BT = attention_mask_BT if self.attached.needs_mask else None
        return self.attached.margins(token_ids_BT, mask_BT)

    def packed_scorer(self, config: EngineConfig, _: ScoreFormula) -> None:
        """None: only the forward pass of a Select-MoE is written for packed batches."""
        if config.row_layout == "packed":
            raise ConfigError(
                "row_layout must be padded for gates on a base, or null, got packed: only a "
                "Select-MoE has a forward pass over packed batches"
            )


def as_selector(model: SelectMoeModel | AttachedGates) -> Selector:
    if isinstance(model, AttachedGates):
        return GatedBaseSelector(model)
    return SelectMoeSelector(model)
