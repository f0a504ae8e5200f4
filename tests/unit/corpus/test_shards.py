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
from tests.made_samples import rejected_rows, sample_of, samples, shard_rows


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


def test_what_a_row_says_beside_its_texts_survives_in_a_shard(tmp_path):
    answer = Message("assistant", "Because.", '{"thinking": "日", "weight": 1}')
    rows = [
        sample_of("plain"),
        Sample(
            "d", "rich", (Message("user", "Why?"), answer), "f:2", '[{"name": "f"}]', '{"a": 1}'
        ),
    ]
    write_shards(rows, tmp_path / "c", rows_per_shard=25)
    assert {sample.sample_id: sample for _, sample in shard_rows(tmp_path / "c")} == {
        sample.sample_id: sample for sample in rows
    }


def test_a_shard_of_an_earlier_version_is_read(tmp_path):
    write_shards(samples(5), tmp_path / "c", rows_per_shard=25)
    before = shard_rows(tmp_path / "c")
    [shard] = (tmp_path / "c").glob("shard-*")
    table = pq.read_table(shard)
    pq.write_table(table.drop_columns(["message_fields", "tools", "extra_columns"]), shard)
    assert shard_rows(tmp_path / "c") == before


def test_a_key_depends_on_what_is_said_and_not_on_columns():
    plain = sample_of("1")
    key = row_key(plain)
    assert row_key(replace(plain, extra_columns='{"a": 1}')) == key

    def with_fields(fields: str) -> str:
        return row_key(
            replace(plain, messages=(*plain.messages[:-1], replace(last, fields=fields)))
        )

    last = plain.messages[-1]
    assert with_fields('{"name": "bob", "weight": 1}') == key
    keys = {with_fields('{"weight": 0}'), with_fields('{"thinking": "a"}')}
    assert len({key, row_key(replace(plain, tools="[]")), *keys}) == 4


@pytest.mark.parametrize("backwards", [False, True])
def test_rows_that_differ_in_columns_alone_have_one_order(tmp_path, backwards):
    rows = [
        replace(sample_of("1"), extra_columns=f'{{"n": {n}}}', source=f"f:{n}") for n in range(9)
    ]
    given = rows[::-1] if backwards else rows
    write_shards(given, tmp_path / "c", rows_per_shard=4, duplicates="keep")
    assert [sample for _, sample in shard_rows(tmp_path / "c")] == rows
    write_shards(given, tmp_path / "c", rows_per_shard=4)
    assert [sample for _, sample in shard_rows(tmp_path / "c")] == rows[:1]
