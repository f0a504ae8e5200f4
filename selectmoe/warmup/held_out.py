"""How gates rank rows that they were not fitted to above corrupted copies: out-of-fold margins, by
which the penalty of the fit and the layers with a gate are chosen.

All of it works on inner products of rows. Those of several layers are the sum of the layers', so
that a choice of layers costs one regression on as many features as there are rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selectmoe.errors import DataError
from selectmoe.warmup.feature_shards import RowFeatures
from selectmoe.warmup.gate_fit import LogisticFit, factor, fit_logistic, labels, standardized

# Shape letters: N = rows, M = copies, A = N + M, L = layers, H = hidden.

NUM_FOLDS = 5
MIN_ROWS = 2 * NUM_FOLDS
MAX_ITERATIONS = 100  # the order of the rows no longer changes


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Margins of rows and copies by gates that were fitted without them, float64."""

    rows_N: np.ndarray
    copies_M: np.ndarray

    @property
    def auroc(self) -> float:
        """Probability that a row has a higher margin than a copy, of any row."""
        ordered = np.sort(self.copies_M)
        below = np.searchsorted(ordered, self.rows_N, side="left")
        not_above = np.searchsorted(ordered, self.rows_N, side="right")
        return float((below + not_above).mean() / 2 / len(ordered))


@dataclass(frozen=True, slots=True, eq=False)
class InnerProducts:
    """Inner products of the standardized features of rows and copies, by layer."""

    layers: tuple[Tensor, ...]  # L times float64 [A, A]
    parents_M: np.ndarray
    num_rows: int

    @classmethod
    def of(cls, features: RowFeatures) -> "InnerProducts":
        products = []
        for layer in range(features.rows_NLH.shape[1]):
            rows_NH, copies_MH = (
                torch.from_numpy(part[:, layer]).double()
                for part in (features.rows_NLH, features.copies_MLH)
            )
            standard_AH, _, _ = standardized(rows_NH, copies_MH)
            products.append(standard_AH @ standard_AH.T)
        return cls(tuple(products), features.parents_M, len(features.rows_NLH))

    def sum(self, positions: Sequence[int]) -> Tensor:
        """Of several layers together: float64 [A, A]."""
        total = torch.zeros_like(self.layers[0])
        for position in positions:
            total += self.layers[position]
        return total

    def held_out(
        self, positions: Sequence[int], penalties: Sequence[float], *, seed: int
    ) -> list[HeldOut]:
        """Out-of-fold margins by the gates of these layers, for each penalty. The copies of a row
        are in the row's fold."""
        products_AA = self.sum(positions)
        num_all = len(products_AA)
        margins = [np.empty(num_all) for _ in penalties]
        for is_held_A in self._folds(seed):
            held, used = (torch.from_numpy(np.flatnonzero(m)) for m in (is_held_A, ~is_held_A))
            factor_UU = factor(products_AA[used][:, used])
            # How the held-out rows look in the features of the factor.
            cross_UA = products_AA[used][:, held]
            held_HU = torch.linalg.solve_triangular(factor_UU, cross_UA, upper=False).T
            for number, penalty in enumerate(penalties):
                fit = self._fit(factor_UU, ~is_held_A, penalty)
                margins[number][is_held_A] = (held_HU @ fit.weights_R + fit.bias).numpy()
        return [HeldOut(m[: self.num_rows], m[self.num_rows :]) for m in margins]

    def approximately_held_out(
        self, positions: Sequence[int], penalties: Sequence[float], *, seed: int
    ) -> list[HeldOut]:
        """The same by the squared error instead of the logistic loss, which orders rows nearly
        alike: one inverse for all folds, in a hundredth of the time.

        With B = K + penalty / weights and a = B⁻¹ y, the error of a fold by a regression without it
        is (B⁻¹)ₕₕ⁻¹ aₕ.
        """
        weights = torch.from_numpy(copy_weights(self.parents_M))
        signs_A, weights_A = labels(self.num_rows, weights)
        products_AA = self.sum(positions)
        products_AA += products_AA.diagonal().mean()  # a feature that is constant: the bias
        outcomes = []
        for penalty in penalties:
            inverse_AA = torch.linalg.inv(products_AA + torch.diag(penalty / weights_A))
            errors_A = inverse_AA @ signs_A
            margins_A = signs_A.clone()
            for is_held_A in self._folds(seed):
                held = torch.from_numpy(np.flatnonzero(is_held_A))
                margins_A[held] -= torch.linalg.solve(inverse_AA[held][:, held], errors_A[held])
            outcomes.append(
                HeldOut(margins_A[: self.num_rows].numpy(), margins_A[self.num_rows :].numpy())
            )
        return outcomes

    def _folds(self, seed: int) -> Iterator[np.ndarray]:
        """A mask of rows and copies for each fold."""
        order_N = np.random.default_rng(seed).permutation(self.num_rows)
        fold_N = np.empty(self.num_rows, np.int64)
        fold_N[order_N] = np.arange(self.num_rows) % NUM_FOLDS
        fold_A = np.concatenate([fold_N, fold_N[self.parents_M]])
        for fold in range(NUM_FOLDS):
            yield fold_A == fold

    def _fit(self, factor_UU: Tensor, is_used_A: np.ndarray, penalty: float) -> LogisticFit:
        is_row_used, is_copy_used = np.split(is_used_A, [self.num_rows])
        weights = copy_weights(self.parents_M[is_copy_used])
        signs, loss_weights = labels(int(is_row_used.sum()), torch.from_numpy(weights))
        return fit_logistic(
            factor_UU, signs, loss_weights, penalty=penalty, max_iterations=MAX_ITERATIONS
        )


def copy_weights(parents_M: np.ndarray) -> np.ndarray:
    """All copies of a row together weigh as much as those of another: float64 (M,)."""
    counts = np.bincount(parents_M)
    weights_M: np.ndarray = 1 / counts[parents_M]
    return weights_M


def rows_with_copies(features: RowFeatures) -> np.ndarray:
    """Positions of the rows that have a copy; the others would teach what cannot be corrupted, not
    what is good. Raises DataError where there are fewer than 10."""
    kept = np.unique(features.parents_M)
    if len(kept) < MIN_ROWS:
        raise DataError(
            f"gates need at least {MIN_ROWS} rows that can be corrupted, got {len(kept)} of "
            f"{len(features.rows_NLH)}"
        )
    return kept
