"""Gates fitted anew on the selector's base: without some kinds, other seeds, half of the rows.

They are fitted as the embedded selector's gates are (`selectmoe/warmup/gate_fit.py`): what a gate
reads of a row is computed once for all fits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import numpy as np
import torch

from benchmarks.quality_scorers import FRESH_GATES, Selector
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.records import Sample
from selectmoe.warmup.gate_features import gate_features
from selectmoe.warmup.gate_fit import fit_gates
from selectmoe.warmup.gate_model import load_gated_model
from selectmoe.warmup.step_batches import make_copy

# Shape letters: N = rows, L = layers, H = hidden.

LEFT_OUT = {
    "order": ("shuffled_words", "shuffled_sentences"),
    "letters": ("gibberish", "typos", "mojibake", "wrong_script"),
    "too little": ("truncated", "shortened", "dropped_words"),
    "too much": ("repeated", "rambling", "markup_noise", "run_on"),
    "no answer": ("refusal", "echoed_question"),
    "another answer": (
        "other_answer",
        "similar_answer",
        "other_turn",
        "mixed_answers",
        "wrong_conclusion",
    ),
    "no content": ("punctuation", "placeholder", "preamble", "link", "one_word", "one_number"),
    "other facts": ("wrong_numbers", "swapped_names", "swapped_words"),
}
"""Groups of similar kinds, left out together: a single kind would be learned from similar ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """Data of one fit."""

    name: str
    training: Sequence[Sample]
    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    seed: int = 1
    """Seed of the kind and the corruption of each row's copy."""


def warmups_without_kinds(training: Sequence[Sample]) -> list[Warmup]:
    """One fit per group of LEFT_OUT, named after the group."""
    return [
        Warmup(
            name=name,
            training=training,
            kinds=tuple(kind for kind in CORRUPTIONS if kind not in group),
        )
        for name, group in LEFT_OUT.items()
    ]


def warmups_for_stability(training: Sequence[Sample]) -> list[Warmup]:
    """Three seeds on all rows, and one seed on each half of them."""
    whole = Warmup(name="", training=training)
    seeds = [replace(whole, name=f"seed {seed}", seed=seed) for seed in (1, 2, 3)]
    halves = [replace(whole, name=f"half {n}", training=training[n::2]) for n in (0, 1)]
    return [*seeds, *halves]


def scores_after_warmups(
    selector: Selector, samples_of: Mapping[str, Sequence[Sample]], warmups: Sequence[Warmup]
) -> dict[str, np.ndarray]:
    """Warm-up -> mean margins of its samples in `samples_of` by the gates fitted to its rows."""
    pairs_of = {warmup.name: rows_and_copies(warmup) for warmup in warmups}
    pairs = [pair for of_warmup in pairs_of.values() for pair in of_warmup]
    samples = (sample for warmup in warmups for sample in samples_of[warmup.name])
    features = Features(selector, [*samples, *(sample for pair in pairs for sample in pair)])
    scores = {}
    for name, of_warmup in pairs_of.items():
        real, copies = (features.of(column) for column in zip(*of_warmup, strict=True))
        gates = fit_gates(real, copies, np.ones(len(copies)))
        scores[name] = gates.margins(features.of(samples_of[name]))
    return scores


def rows_and_copies(warmup: Warmup) -> list[tuple[Sample, Sample]]:
    """A corrupted copy of each row that has one."""
    random = Random(warmup.seed)
    copies = [
        make_copy(row, warmup.training, kinds=warmup.kinds, random=random)
        for row in warmup.training
    ]
    pairs = zip(warmup.training, copies, strict=True)
    return [(row, copy) for row, copy in pairs if copy is not None]


class Features:
    """What the gates read of samples, computed once for each of them."""

    def __init__(self, selector: Selector, samples: Iterable[Sample]) -> None:
        model = load_gated_model(selector.folder, FRESH_GATES, uses_gpu=False, seed=selector.seed)
        model.force_gates_open()
        unique = list(dict.fromkeys(samples))
        self._positions = {sample: position for position, sample in enumerate(unique)}
        with torch.inference_mode():
            rows = selector.tokenizer().tokenize(unique)
            self._features_NLH = gate_features(model.model, rows)

    def of(self, samples: Iterable[Sample]) -> np.ndarray:
        """float32 [N, L, H]."""
        return self._features_NLH[[self._positions[sample] for sample in samples]]


def rank_correlations(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Spearman correlations of all pairs of seeds and of the two halves."""
    from scipy.stats import spearmanr

    return {
        f"{one}, {other}": float(spearmanr(scores[one], scores[other]).statistic)
        for one, other in combinations(scores, 2)
        if one.split()[0] == other.split()[0]
    }
