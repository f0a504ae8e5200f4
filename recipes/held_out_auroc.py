"""AUROC of a score that should rank original rows above corrupted copies of them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from selectmoe.corruptions.kinds import CORRUPTIONS, Corruption, corrupt
from selectmoe.records import Sample, ScoredSample
from selectmoe.scoring.engine import ScoringEngine

NUM_DONORS = 100
COPY_SEED = 1  # differs from the seeds that a warm-up draws for its own copies

RowScores = Callable[[Sequence[Sample]], np.ndarray]
Copies = Mapping[str, Mapping[int, Sample]]
"""Kind of corruption -> index of the original -> its copy; only for rows that have such a copy."""


def copies_by_kind(
    samples: Sequence[Sample], kinds: Mapping[str, Corruption] = CORRUPTIONS
) -> Copies:
    """Every possible corrupted copy of the samples; kinds without any copy are omitted."""
    donors = samples[:NUM_DONORS]
    copies_of: dict[str, dict[int, Sample]] = {}
    for kind in kinds:
        copies = [
            corrupt(row, kind=kind, seed=COPY_SEED, donors=donors, kinds=kinds) for row in samples
        ]
        made = {index: copy for index, copy in enumerate(copies) if copy is not None}
        if made:
            copies_of[kind] = made
    return copies_of


def auroc_by_kind(score: RowScores, samples: Sequence[Sample], copies: Copies) -> dict[str, float]:
    """AUROC per kind, over the rows that have a copy of this kind, and these copies."""
    clean = score(samples)
    return {
        kind: round(auroc(clean[list(made)], score(list(made.values()))), 3)
        for kind, made in copies.items()
    }


def auroc(good: np.ndarray, bad: np.ndarray) -> float:
    """Probability that a good row scores above a bad one; ties count half (Mann-Whitney U)."""
    below = np.searchsorted(np.sort(bad), good, side="left")
    not_above = np.searchsorted(np.sort(bad), good, side="right")
    return float((below + not_above).mean() / 2 / len(bad))


def score_samples(engine: ScoringEngine, samples: Sequence[Sample]) -> np.ndarray:
    outcomes = engine.score(samples)
    return np.array([outcome.score for outcome in outcomes if isinstance(outcome, ScoredSample)])
