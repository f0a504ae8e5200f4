"""Fits gates that only read: the gates are the solution of a logistic regression on what they read
of rows and corrupted copies (`gate_features`), which is computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from selectmoe.model.modeling_select_moe import QualityGate, SelectMoeModel

# Shape letters: N = rows, L = layers, H = hidden, F = L * H, R = features of the regression.

MAX_ITERATIONS = 500  # of L-BFGS; a few hundred suffice
SMALLEST_SCALE = 1e-3  # of a feature: one that never varies is left as it is
# Of the mean inner product of a row with itself, added so that rows that are equal, or nearly, do
# not make the matrix of inner products singular. 1e-10 would do in exact arithmetic.
RIDGE = 1e-8


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


@dataclass(frozen=True, slots=True, eq=False)
class LogisticFit:
    """A logistic regression: margin = weights · features + bias."""

    weights_R: Tensor
    bias: float


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
    num_layers = real_NLH.shape[1]
    real_NF, copies_NF = (
        torch.from_numpy(part).flatten(start_dim=1).double() for part in (real_NLH, copies_NLH)
    )
    features_NF, center_F, scale_F = standardized(real_NF, copies_NF)
    signs_N, loss_weights_N = labels(len(real_NF), torch.from_numpy(weights_N))
    features_NR, in_features = _reduced(features_NF)
    fit = fit_logistic(features_NR, signs_N, loss_weights_N, penalty=penalty)
    plain_F = in_features(fit.weights_R) / scale_F
    # The score averages over the layers.
    weights_LH = num_layers * plain_F.numpy().reshape(num_layers, -1)
    means_L = (center_F.numpy().reshape(num_layers, -1) * weights_LH).sum(axis=1)
    return LinearGates(weights_LH=weights_LH, biases_L=fit.bias - means_L)


def standardized(real_NF: Tensor, copies_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and copies with the mean and standard deviation of the rows taken out, and these two."""
    center_F = real_NF.mean(dim=0)
    scale_F = real_NF.std(dim=0).clamp(min=SMALLEST_SCALE)
    return (torch.cat([real_NF, copies_NF]) - center_F) / scale_F, center_F, scale_F


def labels(num_real: int, copy_weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and weight in the loss of every row, then of every copy: float64 (N,) each."""
    num_copies = len(copy_weights_N)
    signs_N = torch.cat([torch.ones(num_real), -torch.ones(num_copies)]).double()
    copies_N = (copy_weights_N / copy_weights_N.sum()).double()
    real_N = torch.full((num_real,), 1 / num_real, dtype=torch.float64)
    return signs_N, torch.cat([real_N, copies_N]) / 2


def fit_logistic(
    features_NR: Tensor,
    signs_N: Tensor,
    loss_weights_N: Tensor,
    *,
    penalty: float,
    max_iterations: int = MAX_ITERATIONS,
) -> LogisticFit:
    """Minimizes the weighted logistic loss + penalty · |weights|², in the arguments' dtype and on
    their device. The bias is not penalized."""
    weights_R = features_NR.new_zeros(features_NR.shape[1]).requires_grad_()
    bias = features_NR.new_zeros(1).requires_grad_()

    def loss() -> Tensor:
        margins_N = features_NR @ weights_R + bias
        losses_N = functional.softplus(-signs_N * margins_N)
        return (loss_weights_N * losses_N).sum() + penalty * weights_R.square().sum()

    _minimize(loss, [weights_R, bias], max_iterations=max_iterations)
    return LogisticFit(weights_R.detach(), bias.item())


def factor(inner_products_NN: Tensor) -> Tensor:
    """Features [N, N] with these inner products: a regression on them gives the same margins as one
    on the features that the inner products are of."""
    ridge = RIDGE * inner_products_NN.diagonal().mean()
    identity_NN = torch.eye(len(inner_products_NN), dtype=inner_products_NN.dtype)
    factor_NN: Tensor = torch.linalg.cholesky(inner_products_NN + ridge * identity_NN)
    return factor_NN


def row_weights(factor_NN: Tensor, weights_N: Tensor) -> Tensor:
    """How much of each row is in the weights of a regression on `factor`: the weights in the
    original features are the sum of the rows, so weighted."""
    solved: Tensor = torch.linalg.solve_triangular(factor_NN.T, weights_N[:, None], upper=True)
    return solved[:, 0]


def set_gates(model: SelectMoeModel, gates: LinearGates) -> None:
    """Writes the gates into the model: half of a margin in each logit."""
    modules = [module for module in model.modules() if isinstance(module, QualityGate)]
    weights_L2H, biases_L2 = two_logits(gates)
    for module, weights_2H, biases_2 in zip(modules, weights_L2H, biases_L2, strict=True):
        with torch.no_grad():
            module.weight.copy_(weights_2H.to(module.weight))
            module.bias.copy_(biases_2)


def two_logits(gates: LinearGates) -> tuple[Tensor, Tensor]:
    """The gates as a model has them, with half of a margin in each of two logits: float32 weights
    [L, 2, H] and biases [L, 2]."""
    half_LH, half_L = (
        torch.from_numpy(part / 2).float() for part in (gates.weights_LH, gates.biases_L)
    )
    return torch.stack([half_LH, -half_LH], dim=1), torch.stack([half_L, -half_L], dim=1)


def _reduced(features_NF: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features [N, R] whose regression has the same margins, and the function that gives its
    weights in the original features.

    Of few rows with many features (30 layers of 576), the solution lies in the span of the rows: a
    regression on N features gives the same gates in a fraction of the time.
    """
    num_rows, num_features = features_NF.shape
    if num_features <= num_rows:
        return features_NF, lambda weights_F: weights_F
    factor_NN = factor(features_NF @ features_NF.T)
    return factor_NN, lambda weights_N: features_NF.T @ row_weights(factor_NN, weights_N)


def _minimize(loss: Any, parameters: list[Tensor], *, max_iterations: int) -> None:  # noqa: ANN401
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss()
        value.backward()
        return value

    optimizer.step(closure)
