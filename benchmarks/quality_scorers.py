"""The scorers that bench_quality.py compares: the gate, and what it has to be better than.

Each is a function of samples alone, higher is better. IFD: Li et al. 2023, "From Quantity to
Quality"; the authors keep high values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from selectmoe.config.warmup import TrainingConfig
from selectmoe.corruptions.kinds import CORRUPTIONS, corrupt
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.evaluation.answer_loss import MAX_TOKENS_PER_BATCH, batch_losses
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import load_model
from selectmoe.model.registration import register_select_moe
from selectmoe.records import Message, Sample, ScoredSample, TokenizedSample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.warmup.contrastive_pairs import NUM_DONORS
from selectmoe.warmup.gate_model import load_gated_model

SCORERS = ("gate", "untrained gate", "-NLL", "IFD", "length", "linear probe", "random")
FRESH_GATES = TrainingConfig(quality_gate_init_std=0.02)  # as converted models have them
MAX_SEQUENCE_LENGTH = 512

RowScores = Callable[[Sequence[Sample]], np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """The model whose gates are measured, and on whose base the others stand."""

    folder: Path
    weights: Path | None = None  # of stage 1
    seed: int = 1  # of fresh gates, the probe's copies and chance

    def engine(self) -> ScoringEngine:
        return ScoringEngine.from_pretrained(
            self.folder, model_checkpoint_path=self.weights, max_sequence_length=MAX_SEQUENCE_LENGTH
        )

    def language_model(self) -> nn.Module:
        """The base: gates are forced open."""
        register_select_moe()
        model: Any = load_model(
            SelectMoeForCausalLM,
            self.folder,
            dtype=torch.float32,
            experts_implementation="eager",
        ).eval()
        model.force_gates_open()
        return model

    def tokenizer(self) -> ChatTokenizer:
        return self.engine().tokenizer


def scorer(name: str, selector: Selector) -> RowScores:
    """A scorer by itself; those that share their work are `loss_scores` and `probe_scores`."""
    if name == "gate":
        return partial(gate_scores, selector)
    if name == "untrained gate":
        return partial(untrained_gate_scores, selector)
    if name == "length":
        return partial(answer_lengths, selector)
    assert name == "random"
    return lambda samples: np.random.default_rng(selector.seed).random(len(samples))


def gate_scores(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    outcomes = selector.engine().score(samples)
    return np.array([row.score for row in outcomes if isinstance(row, ScoredSample)])


def untrained_gate_scores(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    with TemporaryDirectory() as folder:
        weights = fresh_gates(selector, Path(folder))
        return gate_scores(replace(selector, weights=weights), samples)


def fresh_gates(selector: Selector, output: Path) -> Path:
    """The weights that a warm-up starts from, as a file."""
    register_select_moe()
    model = load_gated_model(selector.folder, FRESH_GATES, uses_gpu=False, seed=selector.seed)
    return save_gate_weights(model, output)


def answer_lengths(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    """Tokens of the answer."""
    return np.array([row.answer_mask.sum() for row in selector.tokenizer().tokenize(samples)])


def answer_nll(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    """Mean over the answer's tokens, nats."""
    model = selector.language_model()
    rows = selector.tokenizer().tokenize(samples)
    found = np.empty(len(samples))
    for batch in pad_samples(rows, max_tokens_per_batch=MAX_TOKENS_PER_BATCH):
        nll_B, num_tokens_B = batch_losses(model, batch)
        # An answer that is cut off entirely has no loss; nor does it surprise.
        found[batch.positions] = nll_B / np.maximum(num_tokens_B, 1)
    return found


def loss_scores(selector: Selector, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """-NLL, and IFD: the answer's NLL with the question, divided by that without."""
    alone = answer_nll(selector, [without_question(sample) for sample in samples])
    asked = answer_nll(selector, samples)
    return {"-NLL": -asked, "IFD": asked / np.maximum(alone, 1e-6)}


def without_question(sample: Sample) -> Sample:
    """The same turns, in which only the assistant says something."""
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
    """Logistic regression on the last hidden state, averaged over the answer, by copies like those
    that gates learn from; by each name of `left_out` without its kinds, and by "" with all."""
    real, copies, kinds = _training_copies(selector, training)
    learned, asked = answer_features(selector, [*real, *copies]), answer_features(selector, samples)
    found = {}
    for name, group in {"": (), **left_out}.items():
        kept = np.array([kind not in group for kind in kinds])
        rows = learned[np.concatenate([kept, kept])]
        labels = [1] * int(kept.sum()) + [0] * int(kept.sum())
        found[name] = _classifier().fit(rows, labels).decision_function(asked)
    return found


def _training_copies(
    selector: Selector, training: Sequence[Sample]
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Real rows, a copy of each, and the copies' kinds, in turn."""
    random, known = Random(selector.seed), tuple(CORRUPTIONS)
    found = []
    for number, sample in enumerate(training):
        kind = known[number % len(known)]
        donors = random.sample(list(training), min(NUM_DONORS, len(training)))
        copy = corrupt(sample, kind=kind, seed=number, donors=donors)
        if copy is not None:
            found.append((sample, copy, kind))
    real, copies, kinds = (list(column) for column in zip(*found, strict=True))
    return real, copies, kinds


def _classifier() -> Any:  # noqa: ANN401 (scikit-learn ships no types)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))


@torch.inference_mode()
def answer_features(selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    """Last hidden state, averaged over the answer's tokens: float32 [samples, hidden]."""
    decoder: Any = selector.language_model()
    rows: list[TokenizedSample] = selector.tokenizer().tokenize(samples)
    found = np.empty((len(rows), decoder.config.hidden_size), np.float32)
    for batch in pad_samples(rows, max_tokens_per_batch=2 * MAX_TOKENS_PER_BATCH):
        hidden_BTH = decoder.model(
            input_ids=torch.from_numpy(batch.token_ids), use_cache=False
        ).last_hidden_state
        mask_BT = torch.from_numpy(batch.answer_mask).float()
        sums_BH = torch.einsum("bth,bt->bh", hidden_BTH, mask_BT)
        found[batch.positions] = sums_BH / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return found


def matched_auroc(
    good: np.ndarray, bad: np.ndarray, num_good: np.ndarray, num_bad: np.ndarray
) -> float | None:
    """AUROC over the (real, copy) couples whose answers have the same number of tokens, to 5 %.

    num_good, num_bad: tokens of the answers. None where there is no such couple.
    """
    longer = np.maximum(num_good[:, None], num_bad[None, :])
    matched = np.abs(num_good[:, None] - num_bad[None, :]) <= 0.05 * longer
    if not matched.any():
        return None
    above = (good[:, None] > bad[None, :]) + 0.5 * (good[:, None] == bad[None, :])
    return float(above[matched].mean())


def pairs_right(scores: np.ndarray, labels: np.ndarray, pair_ids: Sequence[str]) -> float:
    """Share of pairs whose better answer scores above the worse one; ties count half."""
    by_pair: dict[str, dict[bool, float]] = {}
    for score, label, pair_id in zip(scores, labels, pair_ids, strict=True):
        by_pair.setdefault(pair_id, {})[bool(label)] = float(score)
    right: list[float] = [
        (pair[True] > pair[False]) + 0.5 * (pair[True] == pair[False]) for pair in by_pair.values()
    ]
    return float(np.mean(right))


def mean_of(by_kind: Mapping[str, float | None]) -> float | None:
    values = [value for value in by_kind.values() if value is not None]
    return float(np.mean(values)) if values else None
