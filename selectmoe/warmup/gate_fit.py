"""Fits gates that only read: their inputs are computed once, and the gates are then the solution of
a logistic regression, in seconds.

A margin is linear in its gate's input, and the score of a sample averages margins over answer
tokens and layers. Where the gates do not change what the model computes (`force_gates_open`), the
mean input of each layer is therefore all that a warm-up needs to know of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from selectmoe.data.packing import pad_samples
from selectmoe.model.modeling_select_moe import QualityGate, SelectMoeModel
from selectmoe.records import TokenizedSample
from selectmoe.scoring.formulas import scored_tokens

# Shape letters: N = rows, L = layers, H = hidden, F = L * H, B = rows of a batch, T = tokens.

MAX_ITERATIONS = 500  # of L-BFGS; a few hundred suffice
SMALLEST_SCALE = 1e-3  # of a feature: one that never varies is left as it is


@dataclass(frozen=True, slots=True, eq=False)
class LinearGates:
    """One linear gate a layer: margin = weights[l] · u + biases[l]."""

    weights_LH: np.ndarray
    biases_L: np.ndarray

    def margins(self, features_NLH: np.ndarray) -> np.ndarray:
        """Mean margin of each row: float64 (N,)."""
        by_layer_NL = np.einsum("nlh,lh->nl", features_NLH.astype(np.float64), self.weights_LH)
        margins_N: np.ndarray = (by_layer_NL + self.biases_L).mean(axis=1)
        return margins_N


@torch.inference_mode()
def gate_features(
    model: SelectMoeModel, rows: Sequence[TokenizedSample], *, max_tokens_per_batch: int = 4_096
) -> np.ndarray:
    """Mean input of each gate over the answer tokens of each row: float32 [N, L, H]."""
    inputs: dict[int, Tensor] = {}
    gates = [module for module in model.modules() if isinstance(module, QualityGate)]
    handles = [gate.register_forward_hook(_keep(inputs, index)) for index, gate in enumerate(gates)]
    features_NLH = np.empty((len(rows), len(gates), gates[0].in_features), np.float32)
    try:
        for batch in pad_samples(rows, max_tokens_per_batch=max_tokens_per_batch):
            # No attention mask: padding is on the right, and causal attention never looks there.
            model(input_ids=torch.from_numpy(batch.token_ids).to(model.device), use_cache=False)
            answer_BT, real_BT = map(torch.from_numpy, (batch.answer_mask, batch.attention_mask))
            mask_BT = scored_tokens(answer_BT, real_BT, "answer").float().to(model.device)
            weights_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True)
            means = [torch.einsum("bth,bt->bh", u.float(), weights_BT) for u in inputs.values()]
            features_NLH[batch.positions] = torch.stack(means, dim=1).cpu().numpy()
    finally:
        for handle in handles:
            handle.remove()
    return features_NLH


def fit_gates(
    real_NLH: np.ndarray, copies_NLH: np.ndarray, weights_N: np.ndarray, *, penalty: float = 1e-4
) -> LinearGates:
    """The gates that tell rows from corrupted copies: the label form of the contrastive loss, half
    of its weight on real rows, minimized by L-BFGS.

    The loss determines the mean of the biases alone. They are chosen such that the mean margin of
    `real_NLH` is the same in every layer, so that the scores of single layers can be compared.
    weights_N: relative weight of each copy. penalty: of the squared weights of standardized
    features.
    """
    real_NF, copies_NF = (
        torch.from_numpy(part).flatten(start_dim=1).double() for part in (real_NLH, copies_NLH)
    )
    center_F = real_NF.mean(dim=0)
    scale_F = real_NF.std(dim=0).clamp(min=SMALLEST_SCALE)
    features_NF = (torch.cat([real_NF, copies_NF]) - center_F) / scale_F
    signs_N = torch.cat([torch.ones(len(real_NF)), -torch.ones(len(copies_NF))]).double()
    copy_weights_N = torch.from_numpy(weights_N / weights_N.sum()).double()
    real_weights_N = torch.full((len(real_NF),), 1 / len(real_NF), dtype=torch.float64)
    loss_weights_N = torch.cat([real_weights_N, copy_weights_N]) / 2
    weights_F = torch.zeros(features_NF.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        margins_N = features_NF @ weights_F + bias
        losses_N = functional.softplus(-signs_N * margins_N)
        return (loss_weights_N * losses_N).sum() + penalty * weights_F.square().sum()

    _minimize(loss, [weights_F, bias])
    with torch.no_grad():
        plain_F = weights_F / scale_F
    num_layers = real_NLH.shape[1]
    # The score averages over the layers.
    weights_LH = num_layers * plain_F.numpy().reshape(num_layers, -1)
    means_L = (center_F.numpy().reshape(num_layers, -1) * weights_LH).sum(axis=1)
    return LinearGates(weights_LH=weights_LH, biases_L=bias.item() - means_L)


def set_gates(model: SelectMoeModel, gates: LinearGates) -> None:
    """Writes the gates into the model: half of a margin in each logit."""
    modules = [module for module in model.modules() if isinstance(module, QualityGate)]
    for module, weights_H, bias in zip(modules, gates.weights_LH, gates.biases_L, strict=True):
        half_H = torch.from_numpy(weights_H / 2).to(module.weight)
        with torch.no_grad():
            module.weight.copy_(torch.stack([half_H, -half_H]))
            module.bias.copy_(torch.tensor([bias / 2, -bias / 2]))


def _minimize(loss: Any, parameters: list[Tensor]) -> None:  # noqa: ANN401
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=MAX_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _keep(inputs: dict[int, Tensor], index: int) -> Any:  # noqa: ANN401 (torch types hooks loosely)
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[index] = arguments[0]

    return hook
