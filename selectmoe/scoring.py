"""ScoringEngine: samples in, scores out. Owns the model, its device and its dtype."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectmoe.calibration import Calibration, fitting, load_calibration
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pack
from selectmoe.errors import ConfigError, DataError, ModelError
from selectmoe.gate_scores import (
    SCORE_FORMULAS,
    ScoreFormula,
    good_margins,
    layer_scores,
    sample_scores,
    scored_tokens,
    token_scores,
)
from selectmoe.model.checkpoint import (
    ADAPTER_WEIGHTS_NAME,
    calibration_folder,
    hash_weights,
    require_select_moe,
    weights_file,
)
from selectmoe.model.gate_weights import load_gate_weights
from selectmoe.model.merged_adapter import merge_adapter
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM, SelectMoeModel
from selectmoe.model.quiet_loading import quiet_transformers
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import (
    PackedBatch,
    Sample,
    ScoredSample,
    ScoredTokens,
    TokenizedSample,
    UnscoredSample,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ScoringEngine:
    """Scores conversations with the quality gates of one forward pass.

    >>> engine = ScoringEngine.from_pretrained()  # the embedded selector, on the CPU
    >>> [scored] = engine.score([sample])
    >>> scored.score
    0.73
    """

    def __init__(
        self,
        model: SelectMoeModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        formula: str = "answer_margin",
        max_sequence_length: int = 1_024,
        max_tokens_per_batch: int | None = None,
        packer: Callable[..., Iterator[PackedBatch]] = pack,
    ) -> None:
        """`model` is put into evaluation mode and loses the experts of its last layer.

        max_sequence_length: longer samples are scored on their first so many tokens.
        max_tokens_per_batch: tokens of one forward pass, padding included; default 4,096 on a
        CPU, whose caches they fit, and 65,536 on a GPU, which they fill.
        packer: how samples become batches; `pack_closely` suits a server, which has few at a time.
        """
        if formula not in SCORE_FORMULAS:
            raise ConfigError(
                f"scoring formula must be one of {', '.join(SCORE_FORMULAS)}, got {formula!r}"
            )
        self.model = model.eval()
        self.model.skip_last_experts()
        self.device = model.device
        self.formula_name = formula
        self.formula: ScoreFormula = SCORE_FORMULAS[formula]
        self._files: tuple[str, Path | None] | None = None  # the model, and stage 1's weights
        self._stored_calibration: Calibration | None = None
        on_cpu = self.device.type == "cpu"
        self.max_tokens_per_batch = max_tokens_per_batch or (4_096 if on_cpu else 65_536)
        self.packer = packer
        limit = min(max_sequence_length, model.config.max_position_embeddings)
        self.tokenizer = ChatTokenizer(tokenizer, max_sequence_length=limit)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EMBEDDED_SELECTOR,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        experts_implementation: str | None = None,
        **settings: Any,  # noqa: ANN401 (handed on to the constructor, which types them)
    ) -> "ScoringEngine":
        """Loads a Select-MoE from a folder or hub name, and stage 1's gates or adapter (`weights`).

        device: default cuda where there is one. dtype: float32 (default on a CPU) or bfloat16.
        settings: the keyword arguments of the constructor.
        Raises ModelError where the model is no Select-MoE or the weights do not fit it.
        """
        require_select_moe(str(model))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = device == "cpu"
        dtype = dtype or ("float32" if on_cpu else "bfloat16")
        # A loop over experts is the faster one on a CPU, and a stall for each expert on a GPU.
        experts_implementation = experts_implementation or ("eager" if on_cpu else "grouped_mm")
        stage_1 = None if weights is None else weights_file(weights)
        is_adapter = stage_1 is not None and stage_1.name == ADAPTER_WEIGHTS_NAME
        # An adapter names its tensors by those of the whole model that it was trained on.
        model_class: Any = SelectMoeForCausalLM if is_adapter else SelectMoeModel
        with quiet_transformers():
            try:
                # With output_loading_info it returns a pair, which its annotation leaves out.
                pair: Any = model_class.from_pretrained(
                    model,
                    dtype=DTYPES[dtype],
                    attn_implementation=attn_implementation,
                    experts_implementation=experts_implementation,
                    output_loading_info=True,
                )
                tokenizer = AutoTokenizer.from_pretrained(model)
            except (OSError, ValueError, ImportError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ModelError(f"{model}: cannot be loaded: {reason}") from error
        loaded, report = pair
        if report["missing_keys"]:
            raise ModelError(f"{model}: lacks the tensors {sorted(report['missing_keys'])[:3]}")
        if stage_1 is not None and is_adapter:
            loaded = merge_adapter(loaded, stage_1).model
        elif stage_1 is not None:
            load_gate_weights(loaded, stage_1)
        engine = cls(loaded.to(device), tokenizer, **settings)
        engine._files = str(model), stage_1
        engine._stored_calibration = load_calibration(calibration_folder(str(model), stage_1))
        return engine

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """Gives percentiles to this engine's scores; None where none is stored beside the weights,
        and, with a line that says so, where it was made for other weights or another formula.

        The first look hashes the weights: a second for each gigabyte or two.
        """
        return fitting(
            self._stored_calibration, formula=self.formula_name, weights_hash=self.weights_hash
        )

    def weights_hash(self) -> str:
        """SHA-256 of the weights, as manifests have it; only of what was loaded from files."""
        assert self._files is not None, "made from a model in memory"
        return hash_weights(*self._files)

    def score(self, samples: Sequence[Sample]) -> list[ScoredSample | UnscoredSample]:
        """One answer a sample, in the order given; a sample's score does not depend on the rest."""
        tokenized: list[TokenizedSample] = []
        answers: list[ScoredSample | UnscoredSample | None] = []
        for sample, outcome in zip(samples, self.tokenize(samples), strict=True):
            if isinstance(outcome, DataError):
                answers.append(UnscoredSample(sample.sample_id, "chat_template", str(outcome)))
            else:
                answers.append(None)
                tokenized.append(outcome)
        scored = iter(self.score_tokenized(tokenized))
        return [next(scored) if answer is None else answer for answer in answers]

    def tokenize(self, samples: Sequence[Sample]) -> list[TokenizedSample | DataError]:
        """One result a sample; the template's refusal of one leaves its neighbours alone."""
        try:
            return list(self.tokenizer.tokenize(samples))
        except DataError as error:
            if len(samples) == 1:
                return [error]
            return [outcome for sample in samples for outcome in self.tokenize([sample])]

    def score_tokenized(
        self,
        samples: Sequence[TokenizedSample],
        *,
        packer: Callable[..., Iterator[PackedBatch]] | None = None,
    ) -> list[ScoredSample | UnscoredSample]:
        """As `score`, for samples that are token ids already; `packer` in place of the usual."""
        if not samples:
            return []
        packer = packer or self.packer
        batches = list(packer(samples, max_tokens_per_batch=self.max_tokens_per_batch))
        # Every batch is queued before the first number is fetched: a GPU never waits for Python.
        answers = torch.cat([self._score_batch(batch) for batch in batches]).cpu().numpy()
        by_position = np.empty_like(answers)
        by_position[np.concatenate([batch.positions for batch in batches])] = answers
        return [
            _scored_sample(sample, row) for sample, row in zip(samples, by_position, strict=True)
        ]

    def score_each_token(
        self, samples: Sequence[TokenizedSample]
    ) -> list[ScoredTokens | UnscoredSample]:
        """As `score_tokenized`, with the scores of single tokens beside those of samples."""
        answers: dict[int, ScoredTokens | UnscoredSample] = {}
        for batch in self.packer(samples, max_tokens_per_batch=self.max_tokens_per_batch):
            rows_BL, tokens_BT = (part.cpu().numpy() for part in self._score_tokens(batch))
            for position, row, tokens in zip(
                batch.positions.tolist(), rows_BL, tokens_BT, strict=True
            ):
                sample = samples[position]
                scored = _scored_sample(sample, row)
                if isinstance(scored, ScoredSample):
                    answers[position] = ScoredTokens(scored, tokens[: len(sample.token_ids)].copy())
                else:
                    answers[position] = scored
        return [answers[position] for position in range(len(samples))]

    @torch.inference_mode()
    def _score_batch(self, batch: PackedBatch) -> Tensor:
        """Score and layer scores of each row: float32 [B, 1 + L], left on the device."""
        return self._rows(*self._margins(batch))

    @torch.inference_mode()
    def _score_tokens(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """As `_score_batch`, and the score of each token: float32 [B, T]."""
        margins_LBT, mask_BT = self._margins(batch)
        return self._rows(margins_LBT, mask_BT), token_scores(margins_LBT, self.formula)

    def _rows(self, margins_LBT: Tensor, mask_BT: Tensor) -> Tensor:
        by_layer_BL = layer_scores(margins_LBT, mask_BT, self.formula)
        return torch.cat([sample_scores(by_layer_BL, self.formula)[:, None], by_layer_BL], dim=1)

    def _margins(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """One forward pass: the gates' margins [L, B, T], and which tokens count [B, T]."""
        token_ids_BT, attention_mask_BT, answer_mask_BT = (
            self._to_device(array)
            for array in (batch.token_ids, batch.attention_mask, batch.answer_mask)
        )
        # No attention mask: under a causal mask padding on the right is seen by no real token.
        decoded = self.model(input_ids=token_ids_BT, use_cache=False, output_quality_logits=True)
        margins_LBT = good_margins(torch.stack(decoded["quality_logits"]))
        return margins_LBT, scored_tokens(answer_mask_BT, attention_mask_BT, self.formula.tokens)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # only a copy from pinned memory is asynchronous
        return tensor.to(self.device, non_blocking=True)


def _scored_sample(sample: TokenizedSample, row: np.ndarray) -> ScoredSample | UnscoredSample:
    if not math.isfinite(row[0]):
        return UnscoredSample(
            sample.sample_id, "score_not_finite", f"the model's score is {row[0]}, not a number"
        )
    return ScoredSample(
        sample_id=sample.sample_id,
        score=float(row[0]),
        num_tokens=len(sample.token_ids),
        num_answer_tokens=int(sample.answer_mask.sum()),
        truncated=sample.truncated,
        layer_scores=row[1:],
    )
