"""Scores packed (variable-length) batches: a thread makes them ahead, sized to the device's memory,
and a batch that does not fit is split in two."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from selectmoe.config.engine import EngineConfig, RowLayout
from selectmoe.data.packing import collate_packed, pack_samples
from selectmoe.errors import ModelError
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.model.packed_attention import PackedRows, copy_to
from selectmoe.model.packed_forward import PackedForward, bytes_per_token
from selectmoe.records import PackedBatch, TokenizedSample
from selectmoe.scoring.formulas import (
    ScoreFormula,
    counted_tokens,
    good_margins,
    packed_layer_scores,
    sample_scores,
    token_scores,
)

# Shape letters: L = layers, B = rows of a batch, N = tokens of a batch.
CPU_TOKENS = 4_096  # the activations of a small model then fit in the caches
# Larger batches are no faster per token: the matrix products are compute-bound by then.
MOST_TOKENS = 65_536
# The rest is for the workspaces of libraries and for fragmentation.
USABLE_SHARE = 0.8

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PackedScores:
    """The scores of one forward pass, left on the device."""

    samples: tuple[TokenizedSample, ...]
    rows: Tensor  # float32 [B, 1 + L]: score, and score of each layer
    tokens: Tensor  # float32 [N]

    def by_sample(self) -> tuple[tuple[TokenizedSample, ...], np.ndarray, list[np.ndarray]]:
        """Samples, and the rows and tokens of each, fetched from the device."""
        ends = np.cumsum([len(sample.token_ids) for sample in self.samples])
        tokens = np.split(self.tokens.cpu().numpy(), ends[:-1])
        return self.samples, self.rows.cpu().numpy(), tokens


class PackedScorer:
    """Runs forward passes under a token budget, which is halved when memory runs out."""

    def __init__(
        self, model: SelectMoeModel, formula: ScoreFormula, *, max_tokens_per_batch: int | None
    ) -> None:
        """max_tokens_per_batch: None is what the device's memory allows."""
        self.forward = PackedForward(model)
        self.device = model.device
        self.formula = formula
        self.max_tokens_per_batch = max_tokens_per_batch or choose_token_budget(model)

    def score(self, samples: Iterable[TokenizedSample]) -> Iterator[PackedScores]:
        """Scores in the order of the samples, which a thread reads one batch ahead.

        Raises ModelError where a single sample does not fit in memory.
        """
        batches = pack_samples(samples, max_tokens_per_batch=self.max_tokens_per_batch)
        for batch in prefetch(batches):
            yield from self._score(batch)

    def _score(self, batch: PackedBatch) -> Iterator[PackedScores]:
        failure = None
        # A batch may have been made before the budget shrank.
        if len(batch.token_ids) <= self.max_tokens_per_batch or len(batch.samples) == 1:
            try:
                scores = self._pass(batch)
            except torch.OutOfMemoryError as error:
                failure = str(error).strip().split(". ")[0]
            else:
                yield scores
                return
        # Outside the `except`: the traceback keeps the tensors of the failed pass alive.
        if failure is not None:
            self._shrink(batch, failure)
        middle = len(batch.samples) // 2
        for half in (batch.samples[:middle], batch.samples[middle:]):
            yield from self._score(collate_packed(half))

    def _shrink(self, batch: PackedBatch, failure: str) -> None:
        num_tokens = len(batch.token_ids)
        if len(batch.samples) == 1:
            raise ModelError(
                f"a sample of {num_tokens:,} tokens does not fit in the memory of {self.device}; "
                f"max_sequence_length must be lower: {failure}"
            )
        self.max_tokens_per_batch = max(min(num_tokens, self.max_tokens_per_batch) // 2, 1)
        logger.warning(
            "%d tokens in %d samples do not fit in the memory of %s: batches have at most %d from "
            "now on; set max_tokens_per_batch=%d to avoid the retry",
            num_tokens,
            len(batch.samples),
            self.device,
            self.max_tokens_per_batch,
            self.max_tokens_per_batch,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # frees blocks of sizes that no batch asks for again

    @torch.inference_mode()
    def _pass(self, batch: PackedBatch) -> PackedScores:
        rows = PackedRows(
            token_ids_N=copy_to(batch.token_ids, self.device),
            position_ids_N=copy_to(batch.position_ids, self.device),
            cu_seqlens_R1=copy_to(batch.cu_seqlens, self.device),
            lengths=tuple(np.diff(batch.cu_seqlens).tolist()),
        )
        counts = [counted_tokens(s.answer_mask, self.formula.tokens) for s in batch.samples]
        counts_N = copy_to(np.concatenate(counts).astype(np.float32), self.device)
        margins_LN = good_margins(self.forward.quality_logits(rows))
        by_layer_BL = packed_layer_scores(margins_LN, counts_N, rows.cu_seqlens_R1, self.formula)
        scores_B1 = sample_scores(by_layer_BL, self.formula)[:, None]
        return PackedScores(
            samples=batch.samples,
            rows=torch.cat([scores_B1, by_layer_BL], dim=1),
            tokens=token_scores(margins_LN, self.formula),
        )


def choose_layout(config: EngineConfig, device: torch.device) -> RowLayout:
    """The row layout of the settings; null is packed where nothing speaks against it."""
    if config.row_layout is not None:
        return config.row_layout
    # Packed batches have an attention and an experts implementation of their own.
    is_free = config.attn_implementation == "sdpa" and config.experts_implementation is None
    # Grouped matrix products need an Ampere or newer.
    is_able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "packed" if is_free and is_able else "padded"


def choose_token_budget(model: SelectMoeModel) -> int:
    """The default budget: on a GPU the largest power of two whose pass fits in 80 % of the free
    memory, by `bytes_per_token`, and at most 65,536.

    A power of two and a limit, so that GPUs of one kind, and larger ones, make the same batches: a
    score depends on those in its last digit.
    """
    if model.device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    # Memory that torch has reserved and not allocated is free as well.
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return fit_token_budget(free, bytes_per_token(model.config, model.dtype))


def fit_token_budget(free_bytes: int, token_bytes: int) -> int:
    fitting = max(int(USABLE_SHARE * free_bytes / token_bytes), 1)
    return int(min(1 << (fitting.bit_length() - 1), MOST_TOKENS))


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the same items; a thread makes the next one while the caller uses one.

    An exception on the thread is raised here.
    """
    end: Any = object()
    iterator: Iterator[Any] = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as executor:
        coming = executor.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = executor.submit(next, iterator, end)
            yield item
