"""Fits gates of bench_gate_kinds.py to features that are computed once, by kinds and layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gate_kinds_sets import KindRows
from benchmarks.quality_warmups import LEFT_OUT
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.scoring.length_adjustment import fit_length_adjustment
from selectmoe.warmup.gate_fit import SMALLEST_SCALE

# Shape letters: N = all rows, T = training rows, L = layers, H = hidden, F = L * H.

NUM_SEEDS = 3
ALL = tuple(CORRUPTIONS)
LENGTH_KINDS = ("truncated", "shortened")
REPLIES = LEFT_OUT["no content"]


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Kinds of copies, and the weight of those that do not count 1. A kind counts by its weight,
    not by the number of its copies."""

    kinds: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)


def mixes() -> dict[str, Mix]:
    """All kinds, each kind and each group alone, all but a group, and what was guessed to help."""
    replies, mixed = dict.fromkeys(REPLIES, 3.0), {"mixed_answers": 5.0}
    facts_and_order = (*LEFT_OUT["other facts"], *LEFT_OUT["order"])
    return {
        "all": Mix(ALL),
        **{f"only {kind}": Mix((kind,)) for kind in ALL},
        **{f"only group {name}": Mix(kinds) for name, kinds in LEFT_OUT.items()},
        **{f"without group {name}": without(kinds) for name, kinds in LEFT_OUT.items()},
        f"without {', '.join(LENGTH_KINDS)}": without(LENGTH_KINDS),
        "replies x3": Mix(ALL, replies),
        "mixed x5": Mix(ALL, mixed),
        "mixed x5, replies x3": Mix(ALL, mixed | replies),
        "mixed + replies": Mix(("mixed_answers", *REPLIES)),
        "mixed, other facts, order": Mix(("mixed_answers", *facts_and_order)),
    }


def without(kinds: Sequence[str]) -> Mix:
    return Mix(tuple(kind for kind in ALL if kind not in kinds))


def of_groups(groups: Sequence[str]) -> Mix:
    return Mix(tuple(kind for group in groups for kind in LEFT_OUT[group]))


@dataclass(frozen=True, slots=True, eq=False)
class GateFitter:
    """Fits gates to the training rows; scores every row by them."""

    features_NLH: Tensor  # float32, on the device of the fits
    rows: KindRows

    def scores(
        self,
        mix: Mix,
        layers: Sequence[int],
        *,
        penalty: float,
        seed: int | None = None,
        iterations: int,
    ) -> np.ndarray:
        """Margins after the length adjustment of the calibration rows: float64 (N,).

        seed: which third of the training rows to fit to; None is all of them. iterations: the most
        of L-BFGS.
        """
        real, copies = self._training_rows(mix, seed)
        weights_LH, bias = self._fit(mix, layers, real, copies, penalty, iterations)
        margins_N = torch.full((len(self.features_NLH),), bias, device=weights_LH.device)
        for position, layer in enumerate(layers):
            margins_N += self.features_NLH[:, layer] @ weights_LH[position]
        return self.adjusted(margins_N.cpu().numpy().astype(np.float64))

    def adjusted(self, margins_N: np.ndarray) -> np.ndarray:
        lengths_N, calibration = self.rows.num_answer_N, self.rows.calibration
        adjustment = fit_length_adjustment(margins_N[calibration], lengths_N[calibration])
        return adjustment.adjust(margins_N, lengths_N)

    def _training_rows(self, mix: Mix, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Originals that have a copy of the mix, and these copies."""
        rows = self.rows
        is_used_N = rows.training_N & ((seed is None) | (rows.originals_N % NUM_SEEDS == seed))
        copies = np.flatnonzero(is_used_N & np.isin(rows.kinds_N, mix.kinds))
        real = np.flatnonzero(is_used_N & (rows.kinds_N == ""))
        return real[np.isin(rows.originals_N[real], rows.originals_N[copies])], copies

    def _fit(
        self,
        mix: Mix,
        layers: Sequence[int],
        real: np.ndarray,
        copies: np.ndarray,
        penalty: float,
        iterations: int,
    ) -> tuple[Tensor, float]:
        """Weights [L, H] and bias of the margin."""
        device = self.features_NLH.device
        chosen = torch.from_numpy(np.concatenate([real, copies])).to(device)
        features_TF = self.features_NLH[chosen][:, list(layers)].flatten(start_dim=1)
        center_F = features_TF[: len(real)].mean(dim=0)
        scale_F = features_TF[: len(real)].std(dim=0).clamp(min=SMALLEST_SCALE)
        signs_T = torch.ones(len(chosen), device=device)
        signs_T[len(real) :] = -1
        copy_weights = torch.from_numpy(weights_of(self.rows.kinds_N[copies], mix))
        loss_weights = torch.cat([torch.full((len(real),), 1 / len(real)), copy_weights]) / 2
        weights_F, bias = minimize(
            (features_TF - center_F) / scale_F,
            signs_T,
            loss_weights.float().to(device),
            penalty=penalty,
            iterations=iterations,
        )
        plain_F = weights_F / scale_F
        return plain_F.view(len(layers), -1), float(bias - center_F @ plain_F)


def weights_of(kinds_K: np.ndarray, mix: Mix) -> np.ndarray:
    """The weight of each copy in the loss, 1 in sum: float64 (K,)."""
    kinds, numbers_K, counts = np.unique(kinds_K, return_inverse=True, return_counts=True)
    per_copy = np.array([mix.weights.get(str(kind), 1.0) for kind in kinds]) / counts
    weights_K: np.ndarray = per_copy[numbers_K] / per_copy[numbers_K].sum()
    return weights_K


def minimize(
    features_TF: Tensor, signs_T: Tensor, loss_weights_T: Tensor, *, penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Weights and bias of the weighted logistic loss + penalty · |weights|², by L-BFGS in the
    precision and on the device of the features."""
    num_features = features_TF.shape[1]
    given = torch.zeros(num_features + 1, device=features_TF.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [given],
        max_iter=iterations,
        history_size=15,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        margins_T = features_TF @ given[:-1] + given[-1]
        losses_T = functional.softplus(-signs_T * margins_T)
        loss: Tensor = (loss_weights_T * losses_T).sum() + penalty * given[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return given.detach()[:-1], given.detach()[-1]
