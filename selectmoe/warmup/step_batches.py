"""The batches of each optimizer step: which samples with which corrupted copies on which worker.

The batches of a step depend on the seed and the number of the step alone. A resumed run therefore
continues with the batches that the interrupted one would have had, without building the earlier
ones, and several workers, each with a share of the step, together train on what one would.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from selectmoe.corruptions.kinds import corrupt
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import IGNORED_LABEL, collate_padded
from selectmoe.errors import DataError
from selectmoe.records import Sample, TokenizedSample

# Shape letters: B = rows of a batch (real ones first, then their copies), T = tokens.
NUM_DONORS = 64  # samples whose answers a corruption may use
MAX_TRIES = 4
Unit = tuple[TokenizedSample, ...]
"""Rows that stay on one worker together: a sample, or a sample and its copy."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The rows of one forward pass on one worker."""

    sample_ids: tuple[str, ...]  # of the real rows
    token_ids_BT: Tensor
    attention_mask_BT: Tensor  # False on padding
    answer_mask_BT: Tensor
    labels_BT: Tensor  # -100 on padding, copies and, unless the full sequence is predicted, prompts
    num_real: int  # real rows, which come first; then their copies in the same order
    share_of_step: float  # of the step's real rows, over all workers
    num_labels_of_step: int  # over all workers

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = ("token_ids_BT", "attention_mask_BT", "answer_mask_BT", "labels_BT")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRows:
    """The samples to learn from, and their tokens in the same order."""

    samples: Sequence[Sample]
    tokenized: Sequence[TokenizedSample]

    def __post_init__(self) -> None:
        if not self.samples:
            raise DataError("warm-up needs at least one sample, got none")
        assert len(self.samples) == len(self.tokenized)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """How rows are divided into steps, workers and batches."""

    effective_batch_size: int  # real rows of a step, over all workers
    max_tokens_per_batch: int  # of a forward pass on one worker, copies and padding included
    kinds: tuple[str, ...]  # kinds of corrupted copies; () means no copies
    full_sequence_prediction: bool
    seed: int
    batch_size: int | None = None  # real rows of a forward pass on one worker; None is no limit
    rank: int = 0
    num_workers: int = 1
    first_step: int = 0  # a resumed run skips the earlier ones


class StepBatches(IterableDataset[list[MicroBatch]]):
    """This worker's shares of the optimizer steps, endless; each has at least one MicroBatch."""

    def __init__(
        self, rows: TrainingRows, tokenizer: ChatTokenizer, settings: StepSettings
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.settings = settings

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        step = self.settings.first_step
        while True:
            yield self.step(step)
            step += 1

    def step(self, number: int) -> list[MicroBatch]:
        """This worker's share of a step as batches, longest rows first."""
        chosen = self._chosen(number)
        share = chosen[self.settings.rank :: self.settings.num_workers]
        # A worker without a row in this step computes one with weight 0, since the others wait for
        # its gradient.
        weight = 1 / len(chosen) if share else 0.0
        units = self._units(share or chosen[:1])
        num_labels = sum(self._num_labels(self.rows.tokenized[index]) for index, _ in chosen)
        return [
            self._micro_batch(group, weight=weight, num_labels=num_labels)
            for group in groups_of_units(
                units,
                max_tokens=self.settings.max_tokens_per_batch,
                max_units=self.settings.batch_size,
            )
        ]

    def _chosen(self, number: int) -> list[tuple[int, Sample | None]]:
        """(index of a row, its copy) for all rows of a step, over all workers.

        With copies, a row that no kind of corruption can change is skipped. Every worker finds
        that out here, so that all know how many rows the step has.
        """
        size = self.settings.effective_batch_size
        positions = range(number * size, (number + 1) * size)
        indices = [self._index(position) for position in positions]
        if not self.settings.kinds:
            return [(index, None) for index in indices]
        pairs = [
            (index, self._copy(index, position))
            for index, position in zip(indices, positions, strict=True)
        ]
        chosen = [pair for pair in pairs if pair[1] is not None]
        if not chosen:
            raise DataError(
                f"none of {size} samples can be corrupted by {', '.join(self.settings.kinds)}; "
                f"first: {self.rows.samples[indices[0]].sample_id}"
            )
        return chosen

    def _index(self, position: int) -> int:
        """The row at a position of the endless stream of epochs."""
        num_rows = len(self.rows.samples)
        return _order(self.settings.seed, position // num_rows, num_rows)[position % num_rows]

    def _copy(self, index: int, position: int) -> Sample | None:
        random = Random(f"{self.settings.seed} {position}")
        samples = self.rows.samples
        return make_copy(samples[index], samples, kinds=self.settings.kinds, random=random)

    def _units(self, chosen: Sequence[tuple[int, Sample | None]]) -> list[Unit]:
        real = [self.rows.tokenized[index] for index, _ in chosen]
        copies = self.tokenizer.tokenize([copy for _, copy in chosen if copy is not None])
        return list(zip(real, copies, strict=True)) if copies else [(row,) for row in real]

    def _micro_batch(self, units: Sequence[Unit], *, weight: float, num_labels: int) -> MicroBatch:
        rows = [row for nth in zip(*units, strict=True) for row in nth]
        batch = collate_padded(rows, np.arange(len(rows)))
        predicts_all = self.settings.full_sequence_prediction
        predicted = batch.attention_mask if predicts_all else batch.answer_mask
        labels = np.where(predicted, batch.token_ids, IGNORED_LABEL)
        labels[len(units) :] = IGNORED_LABEL
        return MicroBatch(
            sample_ids=tuple(unit[0].sample_id for unit in units),
            token_ids_BT=torch.from_numpy(batch.token_ids),
            attention_mask_BT=torch.from_numpy(batch.attention_mask),
            answer_mask_BT=torch.from_numpy(batch.answer_mask),
            labels_BT=torch.from_numpy(labels),
            num_real=len(units),
            share_of_step=weight * len(units),
            num_labels_of_step=num_labels,
        )

    def _num_labels(self, row: TokenizedSample) -> int:
        """The number of labels of a row; no token precedes the first one to predict it."""
        if self.settings.full_sequence_prediction:
            return len(row.token_ids) - 1
        return int(row.answer_mask[1:].sum())


def make_copy(
    sample: Sample, samples: Sequence[Sample], *, kinds: Sequence[str], random: Random
) -> Sample | None:
    """A copy corrupted by one of `kinds`; None where a few random kinds cannot change the sample.

    samples: the corpus, whose answers some kinds use.
    """
    for _ in range(MAX_TRIES):
        kind = random.choice(kinds)
        donors = random.sample(samples, min(NUM_DONORS, len(samples)))
        copy = corrupt(sample, kind=kind, seed=random.getrandbits(32), donors=donors)
        if copy is not None:
            return copy
    return None


def groups_of_units(
    units: Sequence[Unit], *, max_tokens: int, max_units: int | None = None
) -> list[list[Unit]]:
    """The units longest first, in groups within both limits; tokens include padding."""
    lengths = np.array([max(len(row.token_ids) for row in unit) for unit in units])
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        longest = order[start]
        size = max(max_tokens // int(lengths[longest] * len(units[longest])), 1)
        size = min(size, max_units or size)
        groups.append([units[index] for index in order[start : start + size]])
        start += size
    return groups


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int) -> list[int]:
    """The order of the rows in one epoch."""
    return Random(f"{seed} pass {epoch}").sample(range(num_rows), num_rows)
