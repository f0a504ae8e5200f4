"""Fits gates of bench_gate_kinds.py to features that are computed once, by kinds and layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.gate_kinds_sets import KindRows
from benchmarks.quality_warmups import LEFT_OUT
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.scoring.length_adjustment import fit_length_adjustment
from selectmoe.warmup.gate_fit import fit_logistic, labels, standardized

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
        features_TF, center_F, scale_F = standardized(
            self._features(real, layers), self._features(copies, layers)
        )
        copy_weights = torch.from_numpy(weights_of(self.rows.kinds_N[copies], mix))
        signs_T, loss_weights_T = (part.to(features_TF) for part in labels(len(real), copy_weights))
        found = fit_logistic(
            features_TF, signs_T, loss_weights_T, penalty=penalty, max_iterations=iterations
        )
        plain_F = found.weights_R / scale_F
        return plain_F.view(len(layers), -1), float(found.bias - center_F @ plain_F)

    def _features(self, numbers: np.ndarray, layers: Sequence[int]) -> Tensor:
        """[T, F]"""
        chosen = torch.from_numpy(numbers).to(self.features_NLH.device)
        return self.features_NLH[chosen][:, list(layers)].flatten(start_dim=1)


def weights_of(kinds_K: np.ndarray, mix: Mix) -> np.ndarray:
    """The relative weight of each copy in the loss: float64 (K,)."""
    kinds, numbers_K, counts = np.unique(kinds_K, return_inverse=True, return_counts=True)
    per_copy = np.array([mix.weights.get(str(kind), 1.0) for kind in kinds]) / counts
    weights_K: np.ndarray = per_copy[numbers_K]
    return weights_K
