"""Shards of a corpus: the keys of their rows, rows read by position, and subsets."""

import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from selectmoe.corpus.normalize import write_shards
from selectmoe.corpus.shards import keep_subset, read_rows, read_shard, row_key
from selectmoe.errors import DataError
from selectmoe.records import Message, Sample
from tests.made_samples import rejected_rows, sample_of, samples


@pytest.mark.parametrize("row_group_size", [1, 3, 25])
def test_some_rows_of_a_shard_are_read_by_their_positions(tmp_path, row_group_size):
    write_shards(samples(25), tmp_path / "c", rows_per_shard=25)
    shard = tmp_path / "c" / "shard-000000.parquet"
    rows = [sample for _, sample in read_shard(shard)]
    pq.write_table(pq.read_table(shard), shard, row_group_size=row_group_size)
    for positions in ([], [0], [24], [0, 1, 2, 9, 24], list(range(25))):
        found = list(read_rows(shard, np.array(positions, dtype=np.int64)))
        assert found == [rows[position] for position in positions]


def test_a_row_key_is_made_of_the_id_and_then_of_the_rest():
    key = row_key(sample_of("1"))
    assert len(key) == 32
    assert int(key, 16) >= 0
    assert row_key(sample_of("1", source="elsewhere:9")) == key
    other_content = row_key(sample_of("1", content="No."))
    assert other_content[:16] == key[:16]
    moved = Sample("d", "1", (Message("user", "Why?B"), Message("assistant", "ecause.")))
    others = [row_key(moved), row_key(sample_of("1", dataset="e")), other_content]
    assert len({key[16:], *(other[16:] for other in others)}) == 4
    assert row_key(sample_of("2"))[:16] != key[:16]
    # Pinned: runs of two versions must agree on it to be resumed and re-cut.
    assert key == "b40d9d1ec3484b373f355de98e6698f6"


@pytest.mark.parametrize("ratio", [0.03, 0.5, 0.97])
def test_a_subset_has_about_the_ratio_and_every_rejected_row(ratio):
    kept = list(keep_subset([*samples(4_000), *rejected_rows(5)], ratio=ratio))
    num_kept = sum(isinstance(row, Sample) for row in kept)
    # Four standard deviations of a binomial; the keys are fixed, so this passes always or never.
    assert abs(num_kept - 4_000 * ratio) < 4 * (4_000 * ratio * (1 - ratio)) ** 0.5
    assert len(kept) == num_kept + 5


def test_a_subset_depends_on_the_content_of_a_row_alone():
    corpus = samples(500)
    small, large = ({s.sample_id for s in keep_subset(corpus, ratio=r)} for r in (0.2, 0.6))
    assert small < large
    rng = random.Random(0)
    rng.shuffle(corpus)
    halves = [*keep_subset(corpus[:250], ratio=0.2), *keep_subset(corpus[250:], ratio=0.2)]
    assert {sample.sample_id for sample in halves} == small
    assert len(list(keep_subset(corpus, ratio=1.0))) == 500
    renamed = [replace(sample, sample_id=f"{sample.sample_id} again") for sample in corpus]
    again = {sample.sample_id for sample in keep_subset(renamed, ratio=0.2)}
    assert again == {f"{name} again" for name in small}


def test_a_subset_of_nothing_is_refused():
    with pytest.raises(DataError, match="subset_ratio=1e-09 keeps none of the 10 rows"):
        list(keep_subset(samples(10), ratio=1e-9))
    assert list(keep_subset(rejected_rows(2), ratio=1e-9)) == rejected_rows(2)
