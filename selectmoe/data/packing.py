"""Samples side by side in rectangles, or end to end, as many as a token budget allows."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from selectmoe.records import FlatBatch, PackedBatch, TokenizedSample

# Shape letters: B = rows of a batch, T = tokens of its longest row.


def pack(samples: Sequence[TokenizedSample], *, max_tokens_per_batch: int) -> Iterator[PackedBatch]:
    """Yields every sample once, longest first, in rectangles of at most `max_tokens_per_batch`.

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
        yield collate(samples, longest_first[start : start + num_rows])
        start += num_rows


def pack_closely(
    samples: Sequence[TokenizedSample], *, max_tokens_per_batch: int
) -> Iterator[PackedBatch]:
    """As `pack`, for the few samples of a moment, whose lengths lie far apart.

    Every forward pass costs about as much as 1/32 of a full batch before its first token, so
    another rectangle is worth while where it saves more padding than that. Among all ways to cut
    the samples, longest first, into rectangles, this takes the cheapest. Lengths 900, 20, 10 under
    a budget of 4,096 give (900) and (20, 10), where `pack` gives one rectangle of 2,700.
    """
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    for rows in _cheapest_cuts(lengths[longest_first], max_tokens_per_batch):
        yield collate(samples, longest_first[rows])


def _cheapest_cuts(lengths: np.ndarray, max_tokens_per_batch: int) -> list[slice]:
    """Cuts falling lengths into runs; dynamic programming over where the last run begins."""
    num_rows = len(lengths)
    pass_cost = max_tokens_per_batch // 32
    costs = np.zeros(num_rows + 1, dtype=np.int64)  # of the best cut of the first so many rows
    starts = np.zeros(num_rows + 1, dtype=np.int64)  # where its last run begins
    for end in range(1, num_rows + 1):
        areas = lengths[:end] * (end - np.arange(end))
        areas[:-1][areas[:-1] > max_tokens_per_batch] = np.iinfo(np.int64).max // 2
        totals = costs[:end] + areas + pass_cost
        starts[end] = totals.argmin()
        costs[end] = totals[starts[end]]
    cuts, end = [], num_rows
    while end > 0:
        cuts.append(slice(int(starts[end]), end))
        end = int(starts[end])
    return cuts[::-1]


def collate(samples: Sequence[TokenizedSample], positions: np.ndarray) -> PackedBatch:
    """The samples at `positions` as one rectangle; rows are padded on the right with id 0."""
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
    return PackedBatch(positions, token_ids, attention_mask, answer_mask)


def pack_end_to_end(
    samples: Iterable[TokenizedSample], *, max_tokens_per_batch: int
) -> Iterator[FlatBatch]:
    """Yields every sample once, in order, in batches of at most `max_tokens_per_batch` tokens.

    There is no padding to count, and attention costs what each row costs, so nothing is sorted: a
    batch is full when the next sample does not fit, and is yielded before that one is looked at
    further. A single sample longer than the budget is a batch of its own. The batches depend on the
    lengths and their order alone. Lengths 9, 3, 8, 3 under a budget of 18 give (9, 3) and (8, 3).
    """
    batch: list[TokenizedSample] = []
    num_tokens = first = 0
    for sample in samples:
        length = len(sample.token_ids)
        if batch and num_tokens + length > max_tokens_per_batch:
            yield lay_end_to_end(batch, first=first)
            first += len(batch)
            batch, num_tokens = [], 0
        batch.append(sample)
        num_tokens += length
    if batch:
        yield lay_end_to_end(batch, first=first)


def lay_end_to_end(samples: Sequence[TokenizedSample], *, first: int = 0) -> FlatBatch:
    """`first`: the position of the first."""
    lengths = [len(sample.token_ids) for sample in samples]
    return FlatBatch(
        samples=tuple(samples),
        positions=np.arange(first, first + len(samples), dtype=np.int64),
        token_ids=np.concatenate([sample.token_ids for sample in samples]).astype(np.int64),
        places=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        row_edges=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )
