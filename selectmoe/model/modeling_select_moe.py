"""OLMoE with a quality gate in every layer, as a transformers model type of its own.

Layer l, with u = LayerNorm(h + Attention(h)):

    quality_logits = W_q u + b            2 a token, index 0 is "good"
    good           = softmax(quality_logits)[0]
    output         = good * experts(u) + (1 - good) * trash(u)

Everything else is inherited from transformers' Olmoe classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoePreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeDecoderLayer,
    OlmoeSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_select_moe import SelectMoeConfig
from .quality_losses import QUALITY_LOSSES  # may be extended: `quality_loss_type` is a key of it

# Shape letters: B = batch, T = tokens, H = hidden, L = layers.
GOOD = 0  # index of "good" in the two logits of a gate

_TRASH_EXPERTS: dict[str, Callable[[SelectMoeConfig], nn.Module]] = {}


def register_trash_expert(name: str, build: Callable[[SelectMoeConfig], nn.Module]) -> None:
    """Makes `trash_expert_mode="custom", trash_expert_name=name` use `build(config)`.

    The module maps hidden states [B, T, H] to the same shape; register it before loading a model.
    It starts with the weights that `build` gives it, also where a checkpoint has none for it.
    """
    _TRASH_EXPERTS[name] = build


@dataclass
class SelectMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """A causal language model's output with each part of the loss by itself.

    `loss` = `lm_loss` + `router_aux_loss_coef` * `aux_loss` + `quality_loss_weight` *
    `quality_loss`, where the last two only count when they are enabled. Called with
    `num_items_in_batch`, as Trainer does when it accumulates gradients, every part is this batch's
    share of the step's. `router_logits` has one dict a layer: `quality_logits` [B, T, 2] and
    `moe_logits` [B * T, num_experts].
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[dict[str, Tensor], ...] | None = None  # type: ignore[assignment]
    lm_loss: Tensor | None = None
    quality_loss: Tensor | None = None


class QualityGate(nn.Linear):
    """Two logits a token; a class of its own so that recorders and initialization find it."""

    def __init__(self, config: SelectMoeConfig) -> None:
        super().__init__(config.hidden_size, 2, bias=True)


class ZeroTrashExpert(nn.Module):
    """Trash tokens add nothing to the residual."""

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        return torch.zeros_like(hidden_BTH)


class NoiseTrashExpert(nn.Module):
    """Normal noise with the token's own mean and standard deviation.

    Fresh for every token in training. At evaluation all tokens share one draw of the seed: neither
    batch mates, nor padding, nor a cache, nor the device can change what a token gets.
    """

    def __init__(self, config: SelectMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.seed = config.trash_noise_seed + 7_919 * layer_idx
        self.at_evaluation = config.trash_noise_at_evaluation

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        if not self.training and not self.at_evaluation:
            return torch.zeros_like(hidden_BTH)
        noise = self._normal(hidden_BTH).to(hidden_BTH)
        mean_BT1 = hidden_BTH.mean(-1, keepdim=True)
        std_BT1 = hidden_BTH.std(-1, keepdim=True)
        noise_BTH: Tensor = mean_BT1 + std_BT1 * noise
        return noise_BTH

    def _normal(self, hidden_BTH: Tensor) -> Tensor:
        """Standard normal numbers: [B, T, H] in training, else [H]."""
        if not self.training:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randn(hidden_BTH.shape[-1], generator=generator)
        # From the global generator, which gradient checkpointing rewinds before it recomputes.
        seed = self.seed + int(torch.randint(2**31, ()))
        generator = torch.Generator(hidden_BTH.device).manual_seed(seed)
        return torch.randn(hidden_BTH.shape, generator=generator, device=hidden_BTH.device)


class VectorTrashExpert(nn.Module):
    """One learned vector for every trash token."""

    def __init__(self, config: SelectMoeConfig) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        vector_BTH: Tensor = self.vector.expand_as(hidden_BTH)
        return vector_BTH


def build_trash_expert(config: SelectMoeConfig, layer_idx: int) -> nn.Module:
    if config.trash_expert_mode == "zero":
        return ZeroTrashExpert()
    if config.trash_expert_mode == "noise":
        return NoiseTrashExpert(config, layer_idx)
    if config.trash_expert_name is None:
        return VectorTrashExpert(config)
    if config.trash_expert_name not in _TRASH_EXPERTS:
        raise ValueError(
            f"trash_expert_name {config.trash_expert_name!r} is not registered; call "
            f"register_trash_expert first (known: {', '.join(sorted(_TRASH_EXPERTS)) or 'none'})"
        )
    return _TRASH_EXPERTS[config.trash_expert_name](config)


class SelectMoeSparseMoeBlock(OlmoeSparseMoeBlock):
    """OLMoE's experts behind a quality gate."""

    def __init__(self, config: SelectMoeConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        self.quality_gate = QualityGate(config)
        self.trash_expert = build_trash_expert(config, layer_idx)
        self.forced_open = config.quality_gate_forced_open
        self.gate_only = False  # True skips the experts
        # True cuts the gradient between a gate and the output of its layer: gates then learn from
        # a loss on their logits alone, and backward keeps nothing of the frozen model.
        self.gate_detached = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        quality_logits_BT2 = self.quality_gate(hidden_states)
        if self.gate_only:
            return torch.zeros_like(hidden_states)
        experts_BTH: Tensor = super().forward(hidden_states)
        if self.forced_open:
            return experts_BTH
        # float32: in bfloat16 an open gate (0.998) would round to 1 and its gradient to 0.
        good_BT1 = quality_logits_BT2.float().softmax(dim=-1)[..., GOOD, None]
        if self.gate_detached:
            good_BT1 = good_BT1.detach()
        output_BTH: Tensor = good_BT1.to(experts_BTH.dtype) * experts_BTH
        if not isinstance(self.trash_expert, ZeroTrashExpert):
            bad_BT1 = (1 - good_BT1).to(experts_BTH.dtype)
            output_BTH = output_BTH + bad_BT1 * self.trash_expert(hidden_states)
        return output_BTH


class SelectMoeDecoderLayer(OlmoeDecoderLayer):
    mlp: SelectMoeSparseMoeBlock

    def __init__(self, config: SelectMoeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = SelectMoeSparseMoeBlock(config, layer_idx)


class SelectMoePreTrainedModel(OlmoePreTrainedModel):
    config: SelectMoeConfig
    _no_split_modules = ["SelectMoeDecoderLayer"]
    _can_record_outputs = {
        **OlmoePreTrainedModel._can_record_outputs,
        "quality_logits": OutputRecorder(QualityGate, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file; the experts have it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QualityGate):
            config = self.config
            init.normal_(module.weight, config.quality_gate_init_mean, config.quality_gate_init_std)
            half = config.quality_gate_init_bias / 2
            init.copy_(module.bias, torch.tensor([half, -half]))

    def initialize_weights(self) -> None:
        """As transformers', and gives trash experts what their builders start them with.

        On loading, a tensor that the checkpoint lacks is bare memory by now, and transformers
        knows only torch's own layers. `init.copy_` passes over tensors that were loaded.
        """
        super().initialize_weights()
        for block in self.modules():
            if isinstance(block, SelectMoeSparseMoeBlock):
                fresh = dict(_tensors(build_trash_expert(self.config, block.layer_idx)))
                for name, tensor in _tensors(block.trash_expert):
                    init.copy_(tensor, fresh[name])


class SelectMoeModel(SelectMoePreTrainedModel, OlmoeModel):
    """The decoder without a head; asked for `output_quality_logits` it returns them by layer."""

    def __init__(self, config: SelectMoeConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            SelectMoeDecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()

    def skip_last_experts(self) -> None:
        """For scoring: skips the last layer's experts; `last_hidden_state` then has no meaning."""
        self._blocks()[-1].gate_only = True

    def detach_gates(self) -> None:
        """For gate warm-up on the gates' logits alone: see `gate_detached` of the blocks."""
        for block in self._blocks():
            block.gate_detached = True

    def force_gates_open(self, forced_open: bool = True) -> None:
        """Switches every gate to 1 (the model is its base again) or back to what it has learned."""
        self.config.quality_gate_forced_open = forced_open
        for block in self._blocks():
            block.forced_open = forced_open

    def _blocks(self) -> list[SelectMoeSparseMoeBlock]:
        return [cast(SelectMoeDecoderLayer, layer).mlp for layer in self.layers]


class SelectMoeForCausalLM(SelectMoePreTrainedModel, OlmoeForCausalLM):
    """A gated OLMoE with its language-model head."""

    def __init__(self, config: SelectMoeConfig) -> None:
        super().__init__(config)
        self.model = SelectMoeModel(config)
        self.post_init()

    def force_gates_open(self, forced_open: bool = True) -> None:
        """As `SelectMoeModel.force_gates_open`."""
        self.model.force_gates_open(forced_open)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> SelectMoeCausalLMOutput | tuple[Tensor, ...]:
        """As `OlmoeForCausalLM.forward`, with the gates' logits and the parts of the loss."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if return_dict is None:
            return_dict = self.config.return_dict
        needs_logits = output_router_logits or labels is not None
        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_router_logits=needs_logits,
            output_quality_logits=needs_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(decoded.last_hidden_state[:, kept, :])
        gates: tuple[dict[str, Tensor], ...] = ()
        if needs_logits:
            pairs = zip(decoded["quality_logits"], decoded.router_logits, strict=True)
            gates = tuple({"quality_logits": quality, "moe_logits": moe} for quality, moe in pairs)
        losses = {}
        if labels is not None:
            losses = self._losses(logits, gates, attention_mask, labels, kwargs)
        output = SelectMoeCausalLMOutput(
            **losses,
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            router_logits=gates if output_router_logits else None,
        )
        return output if return_dict else output.to_tuple()

    def _losses(
        self,
        logits: Tensor,
        gates: tuple[dict[str, Tensor], ...],
        attention_mask: Tensor | None,
        labels: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """`loss` and those of its parts that are enabled, by their names in the output."""
        config = self.config
        loss = self.loss_function(logits, labels, config.vocab_size, **kwargs)
        losses = {"lm_loss": loss}
        share = _share_of_step(labels, **kwargs).to(loss.device)
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None  # a 4-D mask says who sees whom, not what is padding
        elif attention_mask is not None:
            attention_mask = attention_mask[:, -labels.shape[1] :]  # without a cache's tokens
        if config.enable_load_balancing:
            moe_logits: Any = tuple(layer["moe_logits"] for layer in gates)
            aux_loss: Any = load_balancing_loss_func(
                moe_logits, config.num_experts, config.num_experts_per_tok, attention_mask
            )
            losses["aux_loss"] = share * aux_loss.to(loss.device)
            loss = loss + config.router_aux_loss_coef * losses["aux_loss"]
        if config.quality_loss_weight:
            quality_logits_LBT2 = torch.stack(
                [layer["quality_logits"].to(loss.device) for layer in gates]
            )
            losses["quality_loss"] = share * self._quality_loss(quality_logits_LBT2, attention_mask)
            loss = loss + config.quality_loss_weight * losses["quality_loss"]
        return {"loss": loss, **losses}

    def _quality_loss(self, logits_LBT2: Tensor, attention_mask: Tensor | None) -> Tensor:
        config = self.config
        if config.quality_loss_type not in QUALITY_LOSSES:
            raise ValueError(
                f"quality_loss_type must be one of {', '.join(sorted(QUALITY_LOSSES))}, "
                f"got {config.quality_loss_type!r}"
            )
        good_LBT = logits_LBT2.float().softmax(dim=-1)[..., GOOD]
        mask_BT = (
            good_LBT.new_ones(good_LBT.shape[1:]) if attention_mask is None else attention_mask
        )
        return QUALITY_LOSSES[config.quality_loss_type](
            good_LBT,
            mask_BT.to(good_LBT.device).bool(),
            sample_wise_averaging=config.sample_wise_averaging,
            **(config.quality_loss_parameters or {}),
        )


def _share_of_step(
    labels_BT: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,  # noqa: ANN401
) -> Tensor:
    """The part of an optimizer step's predicted tokens that is in this batch.

    Given their number, the language-model loss is the batch's sum divided by it, and Trainer adds
    up the losses of a step: without this factor the other losses would count once a batch.
    """
    if num_items_in_batch is None:
        return torch.ones((), device=labels_BT.device)
    targets = labels_BT[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items_in_batch


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def register_auto_classes() -> None:
    """Tells transformers' Auto classes and weight loader of the model type; safe to call twice."""
    AutoConfig.register("select_moe", SelectMoeConfig, exist_ok=True)
    AutoModel.register(SelectMoeConfig, SelectMoeModel, exist_ok=True)
    AutoModelForCausalLM.register(SelectMoeConfig, SelectMoeForCausalLM, exist_ok=True)
    if get_checkpoint_conversion_mapping("select_moe") is None:
        # The hub stores each expert by itself; OLMoE's mapping fuses them on loading.
        register_checkpoint_conversion_mapping(
            "select_moe", get_checkpoint_conversion_mapping("olmoe")
        )


register_auto_classes()
