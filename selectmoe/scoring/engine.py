"""ScoringEngine: scores conversations with one model on one device."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selectmoe.config.engine import EngineConfig, Length
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.model.devices import default_device
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.packed_attention import copy_to
from selectmoe.model.selector_files import SelectorFiles, find_selector
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import (
    PaddedBatch,
    RejectedRow,
    Sample,
    ScoredSample,
    ScoredTokens,
    TokenizedSample,
    UnscoredSample,
)
from selectmoe.scoring.answer_alone import with_answers_alone
from selectmoe.scoring.calibration import Calibration, match_calibration, stored_calibration
from selectmoe.scoring.formulas import (
    SCORE_FORMULAS,
    ScoreFormula,
    layer_scores,
    num_averaged_tokens,
    sample_margins,
    sample_scores,
    scored_tokens,
    token_scores,
)
from selectmoe.scoring.length_adjustment import sigmoid
from selectmoe.scoring.loading import load_selector
from selectmoe.scoring.packed import CPU_TOKENS, MOST_TOKENS, PackedScorer
from selectmoe.scoring.selector_kinds import AnyModel, as_selector

Packer = Callable[..., Iterator[PaddedBatch]]
TOKENIZED_TOGETHER = 256  # samples; takes a few hundredths of a second


class ScoringEngine:
    """Scores conversations with the quality gates of one forward pass.

    >>> engine = ScoringEngine.from_pretrained()  # the embedded selector, on the CPU
    >>> [scored] = engine.score([sample])
    >>> scored.score
    0.73
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
    ) -> None:
        """`model` is put into evaluation mode and loses what lies above its last gate, unless
        `config.signals` need it.

        Device and dtype are the model's; of `config` the dtype and the implementations matter to
        `from_pretrained`, which loads it.
        """
        config = config or EngineConfig()
        self.config = config
        self.selector = as_selector(model, config.signals)
        self.model: Any = model.model if isinstance(model, SelectMoeForCausalLM) else model
        self.device = self.selector.device
        self.num_layers = self.selector.num_layers
        self.formula: ScoreFormula = SCORE_FORMULAS[config.formula]
        self._files: SelectorFiles | None = None
        self._stored_calibration: Calibration | None = None
        self.packed: PackedScorer | None = self.selector.packed_scorer(config, self.formula)
        if self.packed is not None:
            self.max_tokens_per_batch = self.packed.max_tokens_per_batch
        else:
            on_cpu = self.device.type == "cpu"
            default = CPU_TOKENS if on_cpu else MOST_TOKENS
            self.max_tokens_per_batch = config.max_tokens_per_batch or default
        limit = min(
            config.max_sequence_length, self.selector.max_positions or config.max_sequence_length
        )
        self.tokenizer = ChatTokenizer(tokenizer, max_sequence_length=limit, turns=config.turns)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EMBEDDED_SELECTOR,
        *,
        model_checkpoint_path: str | Path | None = None,
        device: str | None = None,
        config: EngineConfig | None = None,
        calibration: Calibration | Literal["stored"] | None = "stored",
        **settings: Any,  # noqa: ANN401 (fields of EngineConfig, which types them)
    ) -> "ScoringEngine":
        """Loads a selector: a Select-MoE from a folder or hub name, a selector folder, or a base
        with gates (see `model.selector_files`).

        model_checkpoint_path: stage 1's weights, a file or the folder of a run.
        device: "cuda" by default if there is a GPU, else "cpu".
        calibration: the one stored beside the weights by default; one that is given is not checked
            against the weights, and without one scores are raw.
        settings: fields of EngineConfig, such as dtype="bfloat16"; they override `config`.
        Raises ModelError where the model is no selector or the weights do not fit it.
        """
        config = dataclasses.replace(config or EngineConfig(), **settings)
        files = find_selector(str(model), model_checkpoint_path)
        loaded = load_selector(files, config, device=device or default_device())
        engine = cls(loaded.model, loaded.tokenizer, config)
        engine._files = files
        if calibration == "stored":
            engine._stored_calibration = stored_calibration(files)
        else:
            engine.calibration = calibration
        return engine

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """Gives the length adjustment of scores and their percentiles; None where none is stored
        beside the weights or it was made for other weights or settings, which a warning says once.

        The first access, at the latest the first score, hashes the weights, which takes about a
        second for 1 to 2 GB.
        """
        if self._files is None:
            return None
        stored = self._stored_calibration
        return match_calibration(stored, self.config, weights_hash=self.weights_hash)

    @property
    def length(self) -> Length:
        """Whether scores are adjusted for answer length or raw."""
        has_adjustment = self.calibration is not None and self.calibration.length is not None
        return "adjusted" if has_adjustment else "raw"

    @property
    def device_and_dtype(self) -> tuple[str, str]:
        """("cpu", "float32"): where the model is, and the dtype of its weights."""
        return self.device.type, str(self.selector.dtype).removeprefix("torch.")

    @property
    def signal_sizes(self) -> dict[str, int]:
        """How many numbers each signal of a scored row has; empty where none is asked for."""
        return {} if self.selector.signals is None else self.selector.signals.sizes

    def weights_hash(self) -> str:
        """SHA-256 of the weights, as in manifests; only for a model that was loaded from files."""
        assert self._files is not None, "made from a model in memory"
        return self._files.weights_hash()

    def score(
        self, samples: Sequence[Sample | Mapping[str, Any]]
    ) -> list[ScoredSample | UnscoredSample]:
        """One outcome per sample, in order; a score does not depend on the other samples.

        A dictionary is read as a row of a corpus; one that is no sample is unscored, with the
        reason.
        """
        answers: list[ScoredSample | UnscoredSample | None] = []

        def tokenized() -> Iterator[TokenizedSample]:
            for outcome in self._tokenize_in_parts([*map(_as_sample, samples, count(1))]):
                if isinstance(outcome, UnscoredSample):
                    answers.append(outcome)
                else:
                    answers.append(None)
                    yield outcome

        scored = iter(self.score_tokenized(tokenized()))
        return [next(scored) if answer is None else answer for answer in answers]

    def _tokenize_in_parts(
        self, samples: Sequence[Sample | UnscoredSample]
    ) -> Iterator[TokenizedSample | UnscoredSample]:
        """Packed batches are scored while the next part is tokenized; padded ones wait for all."""
        size = TOKENIZED_TOGETHER if self.packed else max(len(samples), 1)
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            accepted = [row for row in part if isinstance(row, Sample)]
            outcomes = self.tokenizer.tokenize_to_score(accepted)
            if "pmi" in self.config.signals:
                outcomes = with_answers_alone(self.tokenizer, accepted, outcomes)
            tokenized = iter(outcomes)
            yield from (row if isinstance(row, UnscoredSample) else next(tokenized) for row in part)

    def score_tokenized(
        self,
        samples: Iterable[TokenizedSample],
        *,
        packer: Packer = pad_samples,
    ) -> list[ScoredSample | UnscoredSample]:
        """As `score`, for samples that are tokenized; `packer` makes the padded batches, if any."""
        if self.packed:
            return self._score_packed(self.packed, samples)
        samples = list(samples)
        if not samples:
            return []
        answers = self._by_position(samples, packer, self._score_batch)
        num_scores = 1 + self.num_layers
        scored = self._scored_samples(samples, answers[:, :num_scores])
        reader = self.selector.signals
        if reader is None:
            return scored
        signals = reader.of_rows(answers[:, num_scores:], self._nll_alone(samples, packer))
        return [
            dataclasses.replace(outcome, signals=row)
            if isinstance(outcome, ScoredSample)
            else outcome
            for outcome, row in zip(scored, signals, strict=True)
        ]

    def _nll_alone(self, samples: Sequence[TokenizedSample], packer: Packer) -> np.ndarray:
        """NLL of each answer without its prompt: float32 (B,), NaN where there is none."""
        nll_B = np.full(len(samples), np.nan, dtype=np.float32)
        alone = {
            position: sample.answer_alone
            for position, sample in enumerate(samples)
            if sample.answer_alone is not None
        }
        if alone:
            nll_B[list(alone)] = self._by_position(list(alone.values()), packer, self._nll_batch)
        return nll_B

    def _by_position(
        self,
        samples: Sequence[TokenizedSample],
        packer: Packer,
        run: Callable[[PaddedBatch], Tensor],
    ) -> np.ndarray:
        """What `run` gives for the rows of each batch, in the order of the samples."""
        batches = list(packer(samples, max_tokens_per_batch=self.max_tokens_per_batch))
        # All batches are queued before the first result is fetched: a GPU never waits for Python.
        answers = torch.cat([run(batch) for batch in batches]).cpu().numpy()
        by_position = np.empty_like(answers)
        by_position[np.concatenate([batch.positions for batch in batches])] = answers
        return by_position

    def _score_packed(
        self, packed: PackedScorer, samples: Iterable[TokenizedSample]
    ) -> list[ScoredSample | UnscoredSample]:
        # As above: the loop queues every pass before the first result is fetched.
        passes = [(scores.samples, scores.rows) for scores in packed.score(samples)]
        return [
            outcome
            for part, rows_BL in passes
            for outcome in self._scored_samples(part, rows_BL.cpu().numpy())
        ]

    def _scored_samples(
        self, samples: Sequence[TokenizedSample], rows_BL: np.ndarray
    ) -> list[ScoredSample | UnscoredSample]:
        """rows_BL: float32 [B, 1 + L]: raw score, and score of each layer."""
        scores_B = self._adjusted(samples, rows_BL)
        return [
            _scored_sample(sample, score, row[1:])
            for sample, score, row in zip(samples, scores_B.tolist(), rows_BL, strict=True)
        ]

    def _adjusted(self, samples: Sequence[TokenizedSample], rows_BL: np.ndarray) -> np.ndarray:
        """The score of each sample as it is reported: float32 (B,)."""
        if self.calibration is None or self.calibration.length is None:
            return rows_BL[:, 0]
        num_tokens_B = [
            num_averaged_tokens(int(s.answer_mask.sum()), len(s.token_ids), self.formula)
            for s in samples
        ]
        margins_B = sample_margins(rows_BL[:, 1:], self.formula)
        return sigmoid(self.calibration.length.adjust(margins_B, num_tokens_B))

    def score_each_token(
        self, samples: Sequence[TokenizedSample], *, packer: Packer = pad_samples
    ) -> list[ScoredTokens | UnscoredSample]:
        """As `score_tokenized`, with the scores of single tokens beside those of samples."""
        if self.packed:
            return [
                outcome
                for scores in self.packed.score(samples)
                for outcome in self._scored_tokens(*scores.by_sample())
            ]
        answers: dict[int, ScoredTokens | UnscoredSample] = {}
        for batch in packer(samples, max_tokens_per_batch=self.max_tokens_per_batch):
            rows_BL, tokens_BT = (part.cpu().numpy() for part in self._score_tokens(batch))
            positions = batch.positions.tolist()
            part = [samples[position] for position in positions]
            outcomes = self._scored_tokens(part, rows_BL, list(tokens_BT))
            answers |= dict(zip(positions, outcomes, strict=True))
        return [answers[position] for position in range(len(samples))]

    def _scored_tokens(
        self, samples: Sequence[TokenizedSample], rows_BL: np.ndarray, tokens: Sequence[np.ndarray]
    ) -> Iterator[ScoredTokens | UnscoredSample]:
        scored = self._scored_samples(samples, rows_BL)
        for sample, outcome, scores_T in zip(samples, scored, tokens, strict=True):
            if isinstance(outcome, ScoredSample):
                yield ScoredTokens(outcome, scores_T[: len(sample.token_ids)].copy())
            else:
                yield outcome

    @torch.inference_mode()
    def _score_batch(self, batch: PaddedBatch) -> Tensor:
        """Score and layer scores of each row, and its signals: float32 [B, 1 + L + S], left on the
        device."""
        rows_BL = self._rows(*self._margins(batch))
        reader = self.selector.signals
        return rows_BL if reader is None else torch.cat([rows_BL, reader.columns(batch)], dim=1)

    @torch.inference_mode()
    def _nll_batch(self, batch: PaddedBatch) -> Tensor:
        """Negative log-likelihood of each answer: float32 [B]."""
        assert self.selector.signals is not None
        self._margins(batch)
        return self.selector.signals.nll(batch)

    @torch.inference_mode()
    def _score_tokens(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """As `_score_batch`, and the score of each token: float32 [B, T]."""
        margins_LBT, mask_BT = self._margins(batch)
        return self._rows(margins_LBT, mask_BT), token_scores(margins_LBT, self.formula)

    def _rows(self, margins_LBT: Tensor, mask_BT: Tensor) -> Tensor:
        by_layer_BL = layer_scores(margins_LBT, mask_BT, self.formula)
        return torch.cat([sample_scores(by_layer_BL, self.formula)[:, None], by_layer_BL], dim=1)

    def _margins(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """One forward pass: the gates' margins [L, B, T], and which tokens count [B, T]."""
        token_ids_BT, attention_mask_BT, answer_mask_BT = (
            copy_to(array, self.device)
            for array in (batch.token_ids, batch.attention_mask, batch.answer_mask)
        )
        margins_LBT = self.selector.margins(token_ids_BT, attention_mask_BT)
        return margins_LBT, scored_tokens(answer_mask_BT, attention_mask_BT, self.formula.tokens)


def _as_sample(row: Sample | Mapping[str, Any], number: int) -> Sample | UnscoredSample:
    if isinstance(row, Sample):
        return row
    sample = parse_row(row, RowLocation("samples", number, "samples"))
    if isinstance(sample, RejectedRow):
        return UnscoredSample(sample.sample_id, sample.reason, sample.detail)
    return sample


def _scored_sample(
    sample: TokenizedSample, score: float, layer_scores_L: np.ndarray
) -> ScoredSample | UnscoredSample:
    if not math.isfinite(score):
        return UnscoredSample(
            sample.sample_id, "score_not_finite", f"the model's score is {score}, not a number"
        )
    return ScoredSample(
        sample_id=sample.sample_id,
        score=score,
        num_tokens=len(sample.token_ids),
        num_answer_tokens=int(sample.answer_mask.sum()),
        truncated=sample.truncated,
        layer_scores=layer_scores_L,
    )
