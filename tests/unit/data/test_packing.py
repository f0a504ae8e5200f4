"""Batches under a token budget."""

import itertools
import math

import numpy as np
import pytest

from selectmoe.data.packing import pack_samples, pad_samples, pad_samples_closely
from selectmoe.records import TokenizedSample


def sample_of(length: int) -> TokenizedSample:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return TokenizedSample(str(length), ids, ids % 2 == 0, truncated=False)


@pytest.mark.parametrize("packer", [pad_samples, pad_samples_closely])
@pytest.mark.parametrize("max_tokens", [1, 7, 18, 64, 10_000])
def test_every_sample_is_in_exactly_one_batch_unchanged(packer, max_tokens):
    samples = [sample_of(length) for length in (9, 3, 8, 3, 1, 30, 9, 2)]
    seen = []
    for batch in packer(samples, max_tokens_per_batch=max_tokens):
        for row, position in enumerate(batch.positions):
            mask = batch.attention_mask[row]
            np.testing.assert_array_equal(batch.token_ids[row][mask], samples[position].token_ids)
            np.testing.assert_array_equal(
                batch.answer_mask[row][mask], samples[position].answer_mask
            )
            assert not batch.answer_mask[row][~mask].any()
            seen.append(position)
    assert sorted(seen) == list(range(len(samples)))


@pytest.mark.parametrize("packer", [pad_samples, pad_samples_closely])
@pytest.mark.parametrize("max_tokens", [9, 18, 64])
def test_only_a_sample_longer_than_the_budget_exceeds_it(packer, max_tokens):
    samples = [sample_of(length) for length in (9, 3, 8, 3, 1, 30, 9, 2)]
    for batch in packer(samples, max_tokens_per_batch=max_tokens):
        assert batch.token_ids.size <= max_tokens or len(batch.positions) == 1


def test_rows_of_similar_length_share_a_batch():
    samples = [sample_of(length) for length in (9, 3, 8, 3)]
    batches = pad_samples(samples, max_tokens_per_batch=18)
    assert [batch.attention_mask.sum(1).tolist() for batch in batches] == [[9, 8], [3, 3]]


def test_short_rows_are_not_padded_to_a_long_one_where_a_pass_of_their_own_is_cheaper():
    samples = [sample_of(length) for length in (20, 900, 10, 880)]
    batches = list(pad_samples_closely(samples, max_tokens_per_batch=4_096))
    assert [batch.positions.tolist() for batch in batches] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_is_cheaper(seed):
    lengths = np.random.default_rng(seed).integers(1, 400, size=9)
    budget = 1_024

    def cost(sizes):
        too_large = [rows for rows, longest in sizes if rows > 1 and rows * longest > budget]
        areas = sum(rows * longest for rows, longest in sizes)
        return math.inf if too_large else areas + len(sizes) * (budget // 32)

    ordered = sorted(lengths.tolist(), reverse=True)
    cheapest = min(
        cost([(stop - start, ordered[start]) for start, stop in itertools.pairwise(edges)])
        for number in range(1, 10)
        for inner in itertools.combinations(range(1, 9), number - 1)
        for edges in [(0, *inner, 9)]
    )
    samples = [sample_of(length) for length in lengths]
    found = pad_samples_closely(samples, max_tokens_per_batch=budget)
    assert cost([batch.token_ids.shape for batch in found]) == cheapest


@pytest.mark.parametrize("packer", [pad_samples, pad_samples_closely])
def test_no_samples_give_no_batches(packer):
    assert list(packer([], max_tokens_per_batch=8)) == []


def test_rows_of_one_length_keep_their_order():
    samples = [sample_of(length) for length in (5, 7, 5, 7, 5)]
    batches = pad_samples(samples, max_tokens_per_batch=14)
    assert [batch.positions.tolist() for batch in batches] == [[1, 3], [0, 2], [4]]


def test_batches_depend_on_the_lengths_alone():
    lengths = (9, 3, 8, 3, 1, 30, 9, 2)
    batches = pad_samples([sample_of(length) for length in lengths], max_tokens_per_batch=18)
    others = [
        TokenizedSample("x", np.full(n, 7, np.int32), np.zeros(n, dtype=bool), truncated=True)
        for n in lengths
    ]
    for batch, other in zip(batches, pad_samples(others, max_tokens_per_batch=18), strict=True):
        assert batch.positions.tolist() == other.positions.tolist()
        np.testing.assert_array_equal(batch.attention_mask, other.attention_mask)


def test_an_empty_row_takes_part_and_a_budget_below_one_row_is_a_row():
    samples = [sample_of(length) for length in (0, 2, 0)]
    for max_tokens in (1, 2, 100):
        batches = list(pad_samples(samples, max_tokens_per_batch=max_tokens))
        assert sorted(np.concatenate([batch.positions for batch in batches])) == [0, 1, 2]
        assert sum(int(batch.attention_mask.sum()) for batch in batches) == 2


def test_the_types_are_those_a_model_takes():
    [batch] = pad_samples([sample_of(2), sample_of(3)], max_tokens_per_batch=100)
    arrays = (batch.positions, batch.token_ids, batch.attention_mask, batch.answer_mask)
    assert [array.dtype.name for array in arrays] == ["int64", "int64", "bool", "bool"]
    assert batch.token_ids.tolist() == [[1, 2, 3], [1, 2, 0]]


@pytest.mark.parametrize("max_tokens", [1, 7, 18, 64, 10_000])
def test_end_to_end_every_sample_lies_once_in_order_and_under_the_budget(max_tokens):
    samples = [sample_of(length) for length in (9, 3, 8, 3, 1, 30, 0, 9, 2)]
    batches = list(pack_samples(samples, max_tokens_per_batch=max_tokens))
    assert [sample for batch in batches for sample in batch.samples] == samples
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(9))
    for batch in batches:
        assert len(batch.token_ids) <= max_tokens or len(batch.samples) == 1
        for start, end, sample in zip(
            batch.cu_seqlens, batch.cu_seqlens[1:], batch.samples, strict=False
        ):
            np.testing.assert_array_equal(batch.token_ids[start:end], sample.token_ids)
            assert batch.position_ids[start:end].tolist() == list(range(len(sample.token_ids)))
        assert batch.cu_seqlens[-1] == len(batch.token_ids) == len(batch.position_ids)


def test_end_to_end_a_batch_is_made_before_the_next_sample_but_one_is_asked_for():
    asked = []

    def samples():
        for length in (9, 3, 8, 3):
            asked.append(length)
            yield sample_of(length)

    batches = pack_samples(samples(), max_tokens_per_batch=18)
    assert next(batches).cu_seqlens.tolist() == [0, 9, 12]
    assert asked == [9, 3, 8]
    assert next(batches).cu_seqlens.tolist() == [0, 8, 11]
    assert list(pack_samples([], max_tokens_per_batch=18)) == []
