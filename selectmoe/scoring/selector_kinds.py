"""The two kinds of selectors, as the scoring engine sees them.

Shape letters: L = gates, B = rows, T = tokens.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from selectmoe.config.engine import EngineConfig
from selectmoe.errors import ConfigError
from selectmoe.model.attached_gates import AttachedGates
from selectmoe.model.decoder_layers import decoder_layers
from selectmoe.model.language_model_head import head_of
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.scoring.formulas import ScoreFormula, good_margins
from selectmoe.scoring.packed import PackedScorer, choose_layout
from selectmoe.scoring.signals import SignalReader, needs_head

AnyModel = SelectMoeModel | SelectMoeForCausalLM | AttachedGates

logger = logging.getLogger(__name__)


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

    @property
    def signals(self) -> SignalReader | None:
        """Reads signals from the passes of `margins`; None where none is asked for."""
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

    def __init__(
        self, model: SelectMoeModel | SelectMoeForCausalLM, signals: Sequence[str] = ()
    ) -> None:
        """`model` is put into evaluation mode and loses the experts of its last layer, unless a
        signal needs them. Raises ModelError where one needs a head that `model` lacks."""
        model.eval()
        self.model = model.model if isinstance(model, SelectMoeForCausalLM) else model
        head = head_of(model) if needs_head(signals) else None
        if head is None:
            self.model.skip_last_experts()
        self.signals = None
        if signals:
            layers = decoder_layers(self.model)
            self.signals = SignalReader(
                layers, last_gate=len(layers) - 1, head=head, signals=signals
            )
        self.device: torch.device = self.model.device
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
        if config.signals:
            logger.info("batches are padded: scoring.signals are not read from packed ones")
            return None
        budget = config.max_tokens_per_batch
        return PackedScorer(self.model, formula, max_tokens_per_batch=budget)


class GatedBaseSelector:
    """Any base, with gates attached."""

    def __init__(self, attached: AttachedGates, signals: Sequence[str] = ()) -> None:
        """The base is cut at its last gate, unless a signal needs it whole. Raises ModelError where
        one does and the base has no head, as after a cut."""
        head = head_of(attached.model) if needs_head(signals) else None
        if head is None:
            attached.cut()
        self.attached = attached
        self.signals = None
        if signals:
            last_gate = attached.gates.config.layers[-1]
            self.signals = SignalReader(
                attached.layers, last_gate=last_gate, head=head, signals=signals
            )
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


def as_selector(model: AnyModel, signals: Sequence[str] = ()) -> Selector:
    """Raises SelectMoeError where the model cannot give one of the signals."""
    if isinstance(model, AttachedGates):
        return GatedBaseSelector(model, signals)
    return SelectMoeSelector(model, signals)
