"""Samples of similar length side by side, as many as a token budget allows."""

from collections.abc import Iterator, Sequence

import numpy as np

from selectmoe.records import PackedBatch, TokenizedSample

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
