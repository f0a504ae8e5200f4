"""Batches samples, padded or packed (variable length), within a token budget."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from selectmoe.records import PackedBatch, PaddedBatch, TokenizedSample

# Shape letters: B = rows of a batch, T = tokens of its longest row.
IGNORED_LABEL = -100  # of a token that no loss counts; torch's default `ignore_index`


def pad_samples(
    samples: Sequence[TokenizedSample], *, max_tokens_per_batch: int
) -> Iterator[PaddedBatch]:
    """Yields every sample once, longest first, in padded batches of at most `max_tokens_per_batch`.

    Padding counts: a batch of B rows costs B times its longest row. A single sample longer than
    the budget is a batch of its own, never cropped. The batches depend on the samples' lengths and
    order alone. Lengths 9, 3, 8, 3 under a budget of 18 give (9, 8) and (3, 3).
    """
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(longest_first):
        num_tokens = max(int(lengths[longest_first[start]]), 1)
        num_rows = max(max_tokens_per_batch // num_tokens, 1)
        yield collate_padded(samples, longest_first[start : start + num_rows])
        start += num_rows


def pad_samples_closely(
    samples: Sequence[TokenizedSample], *, max_tokens_per_batch: int
) -> Iterator[PaddedBatch]:
    """As `pad_samples`, for few samples at a time whose lengths lie far apart, as a server has.

    Every forward pass costs about as much as 1/32 of a full batch before its first token, so
    another batch is worthwhile where it saves more padding than that. Among all ways to split the
    samples, longest first, into batches, this takes the cheapest. Lengths 900, 20, 10 under a
    budget of 4,096 give (900) and (20, 10), where `pad_samples` gives one batch of 2,700.
    """
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    for rows in _cheapest_splits(lengths[longest_first], max_tokens_per_batch):
        yield collate_padded(samples, longest_first[rows])


def _cheapest_splits(lengths: np.ndarray, max_tokens_per_batch: int) -> list[slice]:
    """Splits falling lengths into runs; dynamic programming over where the last run begins."""
    num_rows = len(lengths)
    pass_cost = max_tokens_per_batch // 32
    costs = np.zeros(num_rows + 1, dtype=np.int64)  # of the best split of rows [0, index)
    starts = np.zeros(num_rows + 1, dtype=np.int64)  # where its last run begins
    for end in range(1, num_rows + 1):
        areas = lengths[:end] * (end - np.arange(end))
        areas[:-1][areas[:-1] > max_tokens_per_batch] = np.iinfo(np.int64).max // 2
        totals = costs[:end] + areas + pass_cost
        starts[end] = totals.argmin()
        costs[end] = totals[starts[end]]
    runs, end = [], num_rows
    while end > 0:
        runs.append(slice(int(starts[end]), end))
        end = int(starts[end])
    return runs[::-1]


def collate_padded(samples: Sequence[TokenizedSample], positions: np.ndarray) -> PaddedBatch:
    """The samples at `positions`; rows are padded on the right with token id 0."""
    rows = [samples[position] for position in positions]
    shape = (len(rows), max(len(row.token_ids) for row in rows))
    token_ids = np.zeros(shape, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=bool)
    answer_mask = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        kept = slice(len(row.token_ids))
        token_ids[index, kept] = row.token_ids
        attention_mask[index, kept] = True
        answer_mask[index, kept] = row.answer_mask
    return PaddedBatch(positions, token_ids, attention_mask, answer_mask)


def pack_samples(
    samples: Iterable[TokenizedSample], *, max_tokens_per_batch: int
) -> Iterator[PackedBatch]:
    """Yields every sample once, in order, in batches of at most `max_tokens_per_batch` tokens.

    There is no padding to avoid, so nothing is sorted: a batch is full when the next sample does
    not fit, and is yielded before the one after that is read. A single sample longer than the
    budget is a batch of its own. The batches depend on the lengths and their order alone. Lengths
    9, 3, 8, 3 under a budget of 18 give (9, 3) and (8, 3).
    """
    batch: list[TokenizedSample] = []
    num_tokens = first = 0
    for sample in samples:
        length = len(sample.token_ids)
        if batch and num_tokens + length > max_tokens_per_batch:
            yield collate_packed(batch, first=first)
            first += len(batch)
            batch, num_tokens = [], 0
        batch.append(sample)
        num_tokens += length
    if batch:
        yield collate_packed(batch, first=first)


def collate_packed(samples: Sequence[TokenizedSample], *, first: int = 0) -> PackedBatch:
    """`first`: the position of the first sample in the list that is packed."""
    lengths = [len(sample.token_ids) for sample in samples]
    return PackedBatch(
        samples=tuple(samples),
        positions=np.arange(first, first + len(samples), dtype=np.int64),
        token_ids=np.concatenate([sample.token_ids for sample in samples]).astype(np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )
