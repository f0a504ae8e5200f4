"""Batches of samples and their corrupted copies, generated on the fly from a seed."""

from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import collate_padded
from selectmoe.errors import DataError
from selectmoe.records import Sample, TokenizedSample
from selectmoe.warmup.step_batches import make_copy

# Pairs sorted by length together; more means less padding, and batches that differ more in length.
PAIRS_PER_SORT = 256


class ContrastivePairs(IterableDataset[dict[str, Tensor]]):
    """Endless batches; row i and row i + B/2 of a batch are a sample and its corrupted copy.

    A sample gets another kind of corruption in every epoch. Batches hold at most
    `max_tokens_per_batch` tokens, padding included.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: ChatTokenizer,
        *,
        kinds: Sequence[str],
        max_tokens_per_batch: int,
        seed: int,
    ) -> None:
        if not samples:
            raise DataError("warm-up needs at least one sample, got none")
        self.samples = samples
        self.tokenizer = tokenizer
        self.kinds = tuple(kinds)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random = Random(self.seed)
        pending: list[tuple[Sample, Sample]] = []
        while True:
            order = random.sample(range(len(self.samples)), len(self.samples))
            for index in order:
                sample = self.samples[index]
                copy = make_copy(sample, self.samples, kinds=self.kinds, random=random)
                if copy is not None:
                    pending.append((sample, copy))
                if len(pending) == min(PAIRS_PER_SORT, len(self.samples)):
                    yield from self._batches(pending, random)
                    pending = []

    def _batches(
        self, pairs: list[tuple[Sample, Sample]], random: Random
    ) -> Iterator[dict[str, Tensor]]:
        clean = self.tokenizer.tokenize([pair[0] for pair in pairs])
        copies = self.tokenizer.tokenize([pair[1] for pair in pairs])
        lengths = [
            max(len(a.token_ids), len(b.token_ids)) for a, b in zip(clean, copies, strict=True)
        ]
        by_length = np.argsort(lengths, kind="stable")[::-1]
        groups, start = [], 0
        while start < len(by_length):
            size = max(self.max_tokens_per_batch // (2 * lengths[by_length[start]]), 1)
            groups.append(by_length[start : start + size])
            start += size
        random.shuffle(groups)
        for group in groups:
            yield to_batch([clean[i] for i in group], [copies[i] for i in group])


def to_batch(
    clean: Sequence[TokenizedSample], copies: Sequence[TokenizedSample]
) -> dict[str, Tensor]:
    """The first half of the rows are originals, the second half their copies in the same order."""
    rows = [*clean, *copies]
    batch = collate_padded(rows, np.arange(len(rows)))
    return {
        "input_ids": torch.from_numpy(batch.token_ids),
        "attention_mask": torch.from_numpy(batch.attention_mask),
        "answer_mask": torch.from_numpy(batch.answer_mask),
    }
