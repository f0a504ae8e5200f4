"""Chooses the layers that get a gate and the penalty of the fit, by held-out rows and copies."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selectmoe.warmup.feature_shards import RowFeatures
from selectmoe.warmup.held_out import HeldOut, InnerProducts

# Shape letters: L = layers that were read.

# Layers are chosen among windows whose ends are tenths of the depth.
NUM_STEPS = 10
# Of AUROC: a window may be this much behind the best one if fewer layers are computed for it. Its
# standard error is larger with a few hundred rows: .02 with 120.
TOLERANCE = 0.01
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
ERROR_PENALTIES = (1e-2, 1e-1, 1.0)  # of the squared error
# The time of a choice grows with the square of rows and copies, and their memory too.
MAX_FOR_LAYERS, MAX_FOR_PENALTY = 1_000, 4_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """Layers from `first` to `last`, both included, and how held-out rows are told from copies."""

    first: int
    last: int
    auroc: float


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyChoice:
    penalty: float
    rows: np.ndarray  # positions of the rows that have a held-out margin
    held_out: HeldOut


def choose_layers(features: RowFeatures, *, seed: int) -> tuple[Window, list[Window]]:
    """The window of layers to give gates to, by positions, and all that were tried.

    Of the windows that are as good as the best one, within TOLERANCE, it is the one whose last
    layer is the lowest: nothing above that is computed.
    """
    products = InnerProducts.of(features.some_rows(some_rows(features, MAX_FOR_LAYERS, seed=seed)))
    tried = []
    for first, last in windows(features.rows_NLH.shape[1]):
        outcomes = products.approximately_held_out(
            range(first, last + 1), ERROR_PENALTIES, seed=seed
        )
        tried.append(Window(first, last, max(outcome.auroc for outcome in outcomes)))
    return best_window(tried), tried


def windows(num_layers: int) -> Iterator[tuple[int, int]]:
    """First and last layer of each window."""
    edges = np.unique(np.linspace(0, num_layers, NUM_STEPS + 1).round().astype(int)).tolist()
    for start, first in enumerate(edges[:-1]):
        for end in edges[start + 1 :]:
            yield first, end - 1


def best_window(tried: Sequence[Window]) -> Window:
    enough = max(window.auroc for window in tried) - TOLERANCE
    good = [window for window in tried if window.auroc >= enough]
    return min(good, key=lambda window: (window.last, -window.auroc))


def choose_penalty(
    features: RowFeatures, penalties: Sequence[float], *, seed: int
) -> PenaltyChoice:
    """The penalty by which held-out rows are told best from copies, for all layers together."""
    rows = some_rows(features, MAX_FOR_PENALTY, seed=seed)
    products = InnerProducts.of(features.some_rows(rows).as_one_layer())
    outcomes = products.held_out([0], penalties, seed=seed)
    best = max(range(len(penalties)), key=lambda number: outcomes[number].auroc)
    return PenaltyChoice(penalties[best], rows, outcomes[best])


def some_rows(features: RowFeatures, most: int, *, seed: int) -> np.ndarray:
    """Positions of as many rows as there may be, with their copies, at random, ascending."""
    num_rows = len(features.rows_NLH)
    per_row = 1 + len(features.parents_M) / num_rows
    num_kept = min(num_rows, max(int(most / per_row), 1))
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:num_kept])
