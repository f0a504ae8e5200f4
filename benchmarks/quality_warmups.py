"""Warm-ups of new gates on the selector's base: without some kinds, other seeds, half the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.quality_scorers import FRESH_GATES, Selector, gate_scores
from recipes.gate_warmup import GateWarmup, warm_up_gates
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.model.quiet_loading import register_select_moe
from selectmoe.records import Sample
from selectmoe.warmup.gate_model import load_gated_model

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
    """Data and settings of one warm-up."""

    name: str
    training: Sequence[Sample]
    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    seed: int = 1
    num_steps: int = 120
    batch_size: int = 32


def warmups_without_kinds(training: Sequence[Sample], *, num_steps: int) -> list[Warmup]:
    """One warm-up per group of LEFT_OUT, named after the group."""
    return [
        Warmup(
            name=name,
            training=training,
            kinds=tuple(kind for kind in CORRUPTIONS if kind not in group),
            num_steps=num_steps,
        )
        for name, group in LEFT_OUT.items()
    ]


def warmups_for_stability(training: Sequence[Sample], *, num_steps: int) -> list[Warmup]:
    """Three seeds on all rows, and one seed on each half of them."""
    whole = Warmup(name="", training=training, num_steps=num_steps)
    seeds = [replace(whole, name=f"seed {seed}", seed=seed) for seed in (1, 2, 3)]
    halves = [replace(whole, name=f"half {n}", training=training[n::2]) for n in (0, 1)]
    return [*seeds, *halves]


def scores_after_warmup(
    selector: Selector, warmup: Warmup, samples: Sequence[Sample]
) -> np.ndarray:
    """Scores of the samples by new gates after the warm-up."""
    register_select_moe()
    torch.manual_seed(warmup.seed)
    model = load_gated_model(selector.folder, FRESH_GATES, uses_gpu=False, seed=warmup.seed)
    settings = GateWarmup(
        num_steps=warmup.num_steps,
        batch_size=warmup.batch_size,
        kinds=warmup.kinds,
        label_weight=1.0,
        seed=warmup.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(selector.folder)
    with TemporaryDirectory() as folder:
        weights = warm_up_gates(
            model.model, tokenizer, warmup.training, settings=settings, output=Path(folder)
        )
        return gate_scores(replace(selector, weights=weights), samples)


def rank_correlations(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Spearman correlations of all pairs of seeds and of the two halves."""
    from scipy.stats import spearmanr

    return {
        f"{one}, {other}": float(spearmanr(scores[one], scores[other]).statistic)
        for one, other in combinations(scores, 2)
        if one.split()[0] == other.split()[0]
    }
