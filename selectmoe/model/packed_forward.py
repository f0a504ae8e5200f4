"""The forward pass over packed (variable-length) rows, for the quality gates' logits alone.

Unlike `SelectMoeModel.forward` it reads no padding, multiplies the router and the quality gate in
one product, applies the routing weight and the good-probability where the experts' outputs are
gathered, and ends at the last layer's gate. In bfloat16 on a GPU nothing in it waits for the device
(but for the noise of trash experts that keep it at evaluation, which is drawn on the CPU).

Shape letters: N = tokens of all rows, R = rows, H = hidden, A = heads, D = head size, E = experts,
K = experts a token, S = N * K pairs of token and expert, I = intermediate, L = layers,
G = router and gate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from .configuration_select_moe import SelectMoeConfig
from .modeling_select_moe import GOOD, SelectMoeModel, ZeroTrashExpert
from .packed_attention import Attention, PackedRows, choose_attention

# cuBLAS is at its fastest only where a result's rows are a multiple of 16 bytes.
PRODUCT_COLUMNS = 8


class PackedForward:
    """Forward passes through one model. Copies routers and gates when it is built; later changes to
    them have no effect."""

    def __init__(
        self,
        model: SelectMoeModel,
        *,
        attention: Callable[[PackedRows], Attention] | None = None,
    ) -> None:
        """attention: `varlen_attention` or `padded_attention`; None chooses by device."""
        self.model = model
        self.attention = attention or choose_attention(model)
        self.layers = [_PackedLayer(layer, model.config) for layer in model.layers]

    @torch.inference_mode()
    def quality_logits(self, rows: PackedRows) -> Tensor:
        """The gates' logits: float32 [L, N, 2]."""
        hidden_NH = self.model.embed_tokens(rows.token_ids_N)
        cos_1ND, sin_1ND = self.model.rotary_emb(hidden_NH[None], rows.position_ids_N[None])
        rotary = (cos_1ND[0, :, None], sin_1ND[0, :, None])
        attention = self.attention(rows)
        logits_LN2 = []
        for layer in self.layers[:-1]:
            hidden_NH += layer.attend(hidden_NH, rotary, attention)
            logits_N2, output_NH = layer.gated_experts(hidden_NH)
            logits_LN2.append(logits_N2)
            hidden_NH += output_NH
        last = self.layers[-1]
        hidden_NH += last.attend(hidden_NH, rotary, attention)
        logits_LN2.append(last.gate(hidden_NH))
        return torch.stack(logits_LN2)


class _PackedLayer:
    """One decoder layer: its modules, and router and gate as one matrix."""

    def __init__(self, layer: Any, config: SelectMoeConfig) -> None:  # noqa: ANN401 (untyped modules)
        self.layer, self.config = layer, config
        router, gate = layer.mlp.gate, layer.mlp.quality_gate
        num_columns = config.num_experts + 2
        padding = -num_columns % PRODUCT_COLUMNS
        with torch.no_grad():
            zeros_GH = router.weight.new_zeros(padding, router.weight.shape[1])
            self.gates_GH = torch.cat([router.weight, gate.weight, zeros_GH])
            self.bias_G = router.weight.new_zeros(num_columns + padding)
            self.bias_G[config.num_experts : num_columns] = gate.bias
        self.experts_E = torch.arange(
            config.num_experts, dtype=torch.int16, device=router.weight.device
        )

    def attend(
        self, hidden_NH: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        module, limit = self.layer.self_attn, self.config.clip_qkv
        with record_function("projections"):
            normed_NH = _rms_norm(hidden_NH, self.layer.input_layernorm)
            query_NH = _rms_norm(module.q_proj(normed_NH), module.q_norm)
            key_NH = _rms_norm(module.k_proj(normed_NH), module.k_norm)
            value_NH = module.v_proj(normed_NH)
            if limit is not None:
                query_NH, key_NH, value_NH = (
                    states.clamp(-limit, limit) for states in (query_NH, key_NH, value_NH)
                )
            query_NAD, key_NAD, value_NAD = (
                states.unflatten(-1, (-1, module.head_dim))
                for states in (query_NH, key_NH, value_NH)
            )
            query_NAD, key_NAD = _rotate(query_NAD, *rotary), _rotate(key_NAD, *rotary)
        with record_function("attention"):
            mixed_NAD = attention(query_NAD, key_NAD, value_NAD, scale=module.scaling)
        with record_function("projections"):
            output_NH: Tensor = module.o_proj(mixed_NAD.flatten(1))
        return output_NH

    def gate(self, hidden_NH: Tensor) -> Tensor:
        """The quality gate alone: float32 [N, 2]."""
        with record_function("gates"):
            normed_NH = _rms_norm(hidden_NH, self.layer.post_attention_layernorm)
            logits_N2: Tensor = self.layer.mlp.quality_gate(normed_NH).float()
        return logits_N2

    def gated_experts(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The quality gate's logits, float32 [N, 2], and the layer's output, [N, H]."""
        block, num_experts = self.layer.mlp, self.config.num_experts
        with record_function("gates"):
            normed_NH = _rms_norm(hidden_NH, self.layer.post_attention_layernorm)
            both_NG = functional.linear(normed_NH, self.gates_GH, self.bias_G)
            logits_N2 = both_NG[:, num_experts : num_experts + 2].float()
            good_N1 = None if block.forced_open else logits_N2.softmax(-1)[:, GOOD, None]
        with record_function("routing"):
            weights_NK, experts_NK = self._route(both_NG[:, :num_experts])
        if good_N1 is not None:
            weights_NK = weights_NK * good_N1
        output_NH = self._experts(normed_NH, weights_NK, experts_NK)
        if good_N1 is not None and not isinstance(block.trash_expert, ZeroTrashExpert):
            output_NH += (1 - good_N1).to(output_NH.dtype) * block.trash_expert(normed_NH[None])[0]
        return logits_N2, output_NH

    def _route(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and numbers of each token's experts."""
        probs_NE = logits_NE.softmax(-1, dtype=torch.float32)
        weights_NK, experts_NK = probs_NE.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return weights_NK, experts_NK

    def _experts(self, normed_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        experts, num_chosen = self.layer.mlp.experts, experts_NK.shape[1]
        with record_function("routing"):
            # 16 bits: a radix sort reads each key once for every few bits of it.
            sorted_S, order_S = experts_NK.flatten().to(torch.int16).sort(stable=True)
            ends_E = torch.searchsorted(sorted_S, self.experts_E, right=True, out_int32=True)
            numbers_S = torch.arange(len(order_S), device=order_S.device)
            # Inverts the order: the rank of each pair in it.
            ranks_S = torch.empty_like(order_S).scatter_(0, order_S, numbers_S)
        with record_function("experts"):
            # No temporary is named, so each is freed at once: this is the peak of the pass.
            output_SH = functional.grouped_mm(
                _apply_gate(
                    functional.grouped_mm(
                        normed_NH.index_select(0, order_S // num_chosen),
                        experts.gate_up_proj.transpose(1, 2),
                        offs=ends_E,
                    ),
                    experts.act_fn,
                ),
                experts.down_proj.transpose(1, 2),
                offs=ends_E,
            )
            # Gathers, weights and sums in float32 in one kernel, each sum in its own thread: no
            # atomics, so two runs give the same bits.
            return functional.embedding_bag(
                ranks_S.view_as(experts_NK),
                output_SH,
                mode="sum",
                per_sample_weights=weights_NK.to(output_SH.dtype),
            )


def bytes_per_token(config: SelectMoeConfig, dtype: torch.dtype) -> int:
    """Memory of a pass per token, without the weights: the tensors alive at its peak.

        itemsize * (max(K * max(H + 2 I, 3 I), 6 H) + 5 H) + 40 K + 12 E

    As a rule the peak is in a layer's experts: the K copies of a token's hidden state and their
    gate and up projections, or those and the activations; else in its attention, with queries, keys
    and values before and after rotation. Beside them hidden states before and after the norm, and
    what routing needs. The tensors that are alive on the meta device take at most that, and no less
    than three quarters (a test counts them). OLMoE-1B-7B in bfloat16: 87 KB, so 65,536 tokens take
    5.7 GB.
    """
    hidden, chosen = config.hidden_size, config.num_experts_per_tok
    inner = config.intermediate_size
    numbers = max(chosen * max(hidden + 2 * inner, 3 * inner), 6 * hidden) + 5 * hidden
    return numbers * dtype.itemsize + 40 * chosen + 12 * config.num_experts


def _apply_gate(gate_up_S2I: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate_SI, up_SI = gate_up_S2I.chunk(2, dim=-1)
    return activation(gate_SI).mul_(up_SI)


def _rms_norm(states_NH: Tensor, norm: nn.Module) -> Tensor:
    """One kernel, in float32 inside; the module's own forward takes six, each through memory."""
    weight: Any = norm.weight
    eps: Any = norm.variance_epsilon
    return functional.rms_norm(states_NH, weight.shape, weight, eps)


def _rotate(states_NAD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotary position embedding, without the copies that transformers makes."""
    half = states_NAD.shape[-1] // 2
    rotated_NAD = states_NAD * cos_N1D
    rotated_NAD[..., :half].addcmul_(states_NAD[..., half:], sin_N1D[..., :half], value=-1)
    rotated_NAD[..., half:].addcmul_(states_NAD[..., :half], sin_N1D[..., half:])
    return rotated_NAD
