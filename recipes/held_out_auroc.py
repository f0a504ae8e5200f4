"""How well a number orders real rows above corrupted copies of them: the measure of the recipes."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from selectmoe.corruptions.kinds import CORRUPTIONS, Corruption, corrupt
from selectmoe.records import Sample, ScoredSample
from selectmoe.scoring.engine import ScoringEngine

NUM_DONORS = 100
COPY_SEED = 1  # other copies than those of a warm-up, whose seeds it draws by itself

RowScores = Callable[[Sequence[Sample]], np.ndarray]
Copies = Mapping[str, Mapping[int, Sample]]
"""By kind: the position of a real row -> its copy; without the rows that a kind makes no worse."""


def copies_by_kind(
    samples: Sequence[Sample], kinds: Mapping[str, Corruption] = CORRUPTIONS
) -> Copies:
    """Every copy that can be made of the samples; a kind of which there is none is left out."""
    donors = samples[:NUM_DONORS]
    found: dict[str, dict[int, Sample]] = {}
    for kind in kinds:
        copies = [
            corrupt(row, kind=kind, seed=COPY_SEED, donors=donors, kinds=kinds) for row in samples
        ]
        made = {index: copy for index, copy in enumerate(copies) if copy is not None}
        if made:
            found[kind] = made
    return found


def auroc_by_kind(score: RowScores, samples: Sequence[Sample], copies: Copies) -> dict[str, float]:
    """Real rows against the copies of each kind, of the rows that have such a copy."""
    clean = score(samples)
    return {
        kind: round(auroc(clean[list(made)], score(list(made.values()))), 3)
        for kind, made in copies.items()
    }


def auroc(good: np.ndarray, bad: np.ndarray) -> float:
    """Chance that a good row scores above a bad one; ties count half (Mann-Whitney U)."""
    below = np.searchsorted(np.sort(bad), good, side="left")
    not_above = np.searchsorted(np.sort(bad), good, side="right")
    return float((below + not_above).mean() / 2 / len(bad))


def scores(engine: ScoringEngine, samples: Sequence[Sample]) -> np.ndarray:
    outcomes = engine.score(samples)
    return np.array([outcome.score for outcome in outcomes if isinstance(outcome, ScoredSample)])
