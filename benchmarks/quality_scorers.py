"""The scorers that bench_quality.py compares: the gate and its baselines.

Each maps samples to scores, higher is better. IFD: Li et al. 2023, "From Quantity to Quality"; the
authors keep high values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recipes.baseline_scores import (
    FRESH_GATES_STD,
    answer_lengths,
    answer_nll,
    load_language_model,
    save_untrained_gates,
)
from recipes.held_out_auroc import RowScores
from selectmoe.config.engine import EngineConfig
from selectmoe.config.warmup import TrainingConfig
from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.evaluation.answer_loss import MAX_TOKENS_PER_BATCH
from selectmoe.records import Message, Sample, ScoredSample, TokenizedSample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.selection.top_k import num_to_keep
from selectmoe.warmup.step_batches import NUM_DONORS

SCORERS = ("gate", "untrained gate", "-NLL", "IFD", "length", "linear probe", "random")
FRESH_GATES = TrainingConfig(quality_gate_init_std=FRESH_GATES_STD)
MAX_SEQUENCE_LENGTH = EngineConfig().max_sequence_length
SMALLEST_FRACTION = 0.05
LIKE_LENGTH = 0.8  # shorter over longer answer of a pair that counts as of like length


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """The model whose gates are evaluated, and whose base the baselines use."""

    folder: Path
    weights: Path | None = None  # of stage 1
    seed: int = 1  # of untrained gates, the copies for the probe and random scores

    def engine(self) -> ScoringEngine:
        return ScoringEngine.from_pretrained(
            self.folder, model_checkpoint_path=self.weights, max_sequence_length=MAX_SEQUENCE_LENGTH
        )

    def tokenizer(self) -> ChatTokenizer:
        return self.engine().tokenizer


def scorer(name: str, selector: Selector) -> RowScores:
    """One of the independent scorers; `loss_scores` and `probe_scores` compute several at once."""
    if name == "gate":
        return partial(gate_scores, selector)
    if name == "untrained gate":
        return partial(untrained_gate_scores, selector)
    if name == "length":
        return partial(answer_lengths, selector.tokenizer())
    assert name == "random"
    return lambda samples: np.random.default_rng(selector.seed).random(len(samples))


def gate_scores(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    outcomes = selector.engine().score(samples)
    # A row whose prompt fills the maximum length has no score, and stage 2 would not select it.
    return np.array([row.score if isinstance(row, ScoredSample) else 0.0 for row in outcomes])


def untrained_gate_scores(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    with TemporaryDirectory() as folder:
        weights = save_untrained_gates(
            selector.folder, FRESH_GATES, seed=selector.seed, output=Path(folder)
        )
        return gate_scores(replace(selector, weights=weights), samples)


def loss_scores(selector: Selector, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """-NLL, and IFD: the NLL of the answer given the question, divided by that without it."""
    model, tokenizer = load_language_model(selector.folder, on_gpu=False), selector.tokenizer()
    alone = answer_nll(model, tokenizer, [without_question(sample) for sample in samples])
    given = answer_nll(model, tokenizer, samples)
    return {"-NLL": -given, "IFD": given / np.maximum(alone, 1e-6)}


def without_question(sample: Sample) -> Sample:
    """The same turns with empty system and user messages."""
    turns = (
        turn if turn.role == "assistant" else Message(turn.role, "") for turn in sample.messages
    )
    return replace(sample, messages=tuple(turns))


def probe_scores(
    selector: Selector,
    training: Sequence[Sample],
    samples: Sequence[Sample],
    left_out: Mapping[str, Sequence[str]],
) -> dict[str, np.ndarray]:
    """Logistic regression on the mean last hidden state of the answer, trained on corrupted copies
    as the gates are: under "" on all kinds, under each name of `left_out` without its kinds."""
    real, copies, kinds = corrupt_in_turn(selector, training)
    training_features = answer_features(selector, [*real, *copies])
    features = answer_features(selector, samples)
    scores = {}
    for name, group in {"": (), **left_out}.items():
        kept = np.array([kind not in group for kind in kinds])
        rows = training_features[np.concatenate([kept, kept])]
        labels = [1] * int(kept.sum()) + [0] * int(kept.sum())
        scores[name] = new_classifier().fit(rows, labels).decision_function(features)
    return scores


def corrupt_in_turn(
    selector: Selector, training: Sequence[Sample]
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Originals, a copy of each, and the kinds of the copies, which alternate."""
    random, all_kinds = Random(selector.seed), tuple(CORRUPTIONS)
    triples = []
    for number, sample in enumerate(training):
        kind = all_kinds[number % len(all_kinds)]
        donors = random.sample(list(training), min(NUM_DONORS, len(training)))
        copy = corrupt(sample, kind=kind, seed=number, donors=donors)
        if copy is not None:
            triples.append((sample, copy, kind))
    real, copies, kinds = (list(column) for column in zip(*triples, strict=True))
    return real, copies, kinds


def new_classifier() -> Any:  # noqa: ANN401 (scikit-learn ships no types)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))


@torch.inference_mode()
def answer_features(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    """Last hidden state, averaged over the answer tokens: float32 [samples, hidden]."""
    model = load_language_model(selector.folder, on_gpu=False)
    rows: list[TokenizedSample] = selector.tokenizer().tokenize(samples)
    features = np.empty((len(rows), model.config.hidden_size), np.float32)
    for batch in pad_samples(rows, max_tokens_per_batch=2 * MAX_TOKENS_PER_BATCH):
        output = model.model(input_ids=torch.from_numpy(batch.token_ids), use_cache=False)
        mask_BT = torch.from_numpy(batch.answer_mask).float()
        sums_BH = torch.einsum("bth,bt->bh", output.last_hidden_state, mask_BT)
        features[batch.positions] = sums_BH / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return features


def matched_auroc(
    good: np.ndarray, bad: np.ndarray, num_good: np.ndarray, num_bad: np.ndarray
) -> float | None:
    """AUROC over the (original, copy) pairs whose answer lengths differ by at most 5 %.

    num_good, num_bad: tokens of the answers. None if there is no such pair.
    """
    longer = np.maximum(num_good[:, None], num_bad[None, :])
    matched = np.abs(num_good[:, None] - num_bad[None, :]) <= 0.05 * longer
    if not matched.any():
        return None
    above = (good[:, None] > bad[None, :]) + 0.5 * (good[:, None] == bad[None, :])
    return float(above[matched].mean())


def pairs_right(scores: np.ndarray, labels: np.ndarray, pair_ids: Sequence[str]) -> float:
    """Fraction of pairs whose better answer scores above the worse one; ties count half."""
    by_pair: dict[str, dict[bool, float]] = {}
    for score, label, pair_id in zip(scores, labels, pair_ids, strict=True):
        by_pair.setdefault(pair_id, {})[bool(label)] = float(score)
    right: list[float] = [
        (pair[True] > pair[False]) + 0.5 * (pair[True] == pair[False]) for pair in by_pair.values()
    ]
    return float(np.mean(right))


def like_length(lengths: np.ndarray, pair_ids: Sequence[str]) -> np.ndarray:
    """Which rows belong to a pair whose answers have similar lengths: bool (N,)."""
    by_pair: dict[str, list[float]] = {}
    for length, pair_id in zip(lengths.tolist(), pair_ids, strict=True):
        by_pair.setdefault(pair_id, []).append(length)
    alike = {name: min(pair) >= LIKE_LENGTH * max(pair) for name, pair in by_pair.items()}
    return np.array([alike[pair_id] for pair_id in pair_ids])


def length_of_best(scores: np.ndarray, lengths: np.ndarray) -> str:
    """Median answer tokens of the best 5 % of some rows, and of all of them."""
    best = np.argsort(-scores, kind="stable")[: num_to_keep(len(scores), SMALLEST_FRACTION)]
    return f"{np.median(lengths[best]):g} / {np.median(lengths):g}"


def mean_of(by_kind: Mapping[str, float | None]) -> float | None:
    values = [value for value in by_kind.values() if value is not None]
    return float(np.mean(values)) if values else None
