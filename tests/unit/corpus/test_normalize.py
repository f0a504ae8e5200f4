"""Normalized shards: the same for every order and splitting of the rows, and every row counted."""

import json
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.corpus import buckets, normalize
from selectmoe.corpus import parts as corpus_parts
from selectmoe.corpus.normalize import rows_read, write_corpus, write_shards
from selectmoe.corpus.shards import (
    CorpusSummary,
    keep_subset,
    read_summary,
    row_key,
)
from selectmoe.data.readers import read_corpora
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample
from tests.made_samples import rejected_rows, sample_of, samples, shard_rows


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def test_every_sample_is_in_one_shard_unchanged_and_in_the_order_of_its_key(tmp_path):
    corpus = samples(250)
    summary = write_shards(corpus, tmp_path / "c", rows_per_shard=100)
    rows = shard_rows(tmp_path / "c")
    assert {sample.sample_id: sample for _, sample in rows} == {s.sample_id: s for s in corpus}
    keys = [key for key, _ in rows]
    assert keys == sorted(keys) == [row_key(sample) for _, sample in rows]
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "c").glob("s*-*"))] == [
        100,
        100,
        50,
    ]
    assert summary == CorpusSummary(250, 0, 3, 0, {"d0": 84, "d1": 83, "d2": 83}, "")
    assert read_summary(tmp_path / "c") == summary


@pytest.mark.parametrize("max_rows_in_memory", [2, 7, 100, 249, 250, 251, 1_000])
def test_shards_do_not_depend_on_memory_or_on_the_order_of_the_rows(
    tmp_path, monkeypatch, max_rows_in_memory
):
    corpus = samples(250)
    write_shards(corpus, tmp_path / "a", rows_per_shard=64)
    random.Random(1).shuffle(corpus)
    monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", max_rows_in_memory)
    write_shards(corpus, tmp_path / "b", rows_per_shard=64)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert len(shard_bytes(tmp_path / "b")) == 4


def test_shards_of_the_same_rows_in_other_files_differ_in_the_source_alone(tmp_path):
    rows = [{"dataset": "d", "id": n, "text": f"Because {n}."} for n in range(60)]
    tables = []
    for num_files in (1, 7):
        paths = [tmp_path / f"{num_files}-{n}.jsonl" for n in range(num_files)]
        for n, path in enumerate(paths):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[n::num_files]))
        folder = tmp_path / str(num_files)
        write_shards(read_corpora([str(p) for p in paths]), folder, rows_per_shard=25)
        tables.append([pq.read_table(path) for path in sorted(folder.glob("shard-*"))])
    for one, seven in zip(*tables, strict=True):
        assert one.drop_columns("source") == seven.drop_columns("source")
        assert one["source"] != seven["source"]


def test_duplicates_that_are_asked_for_are_all_kept_and_counted(tmp_path, monkeypatch):
    corpus = [
        sample_of("1", source="f:1"),
        sample_of("1", source="f:2"),  # the very same
        sample_of("1", source="f:3"),
        sample_of("1", content="No.", source="f:4"),  # the id only
        sample_of("1", dataset="e", source="f:5"),  # another data set's
        sample_of("2", source="f:6"),
    ]
    for max_rows_in_memory in (2, 100):
        monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", max_rows_in_memory)
        summary = write_shards(corpus, tmp_path / "c", rows_per_shard=4, duplicates="keep")
        assert (summary.num_read, summary.num_duplicate_ids) == (6, 3)
        assert (summary.num_duplicates, summary.num_left_out) == (4, 0)
        rows = shard_rows(tmp_path / "c")
        assert sorted(sample.source for _, sample in rows) == [f"f:{n}" for n in range(1, 7)]
        same = [key for key, sample in rows if sample.source in ("f:1", "f:2", "f:3")]
        key = row_key(corpus[0])
        assert same == [key, f"{key}-1", f"{key}-2"]
        assert len({key for key, _ in rows}) == 6


def test_rows_whose_name_was_ignored_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = ({"text": f"{name}", "id": name} for name in (["a"], {"b": 1}, "c", 4, None))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = write_corpus([str(file)], tmp_path / "c", rows_per_shard=4)
    assert (summary.num_rows, summary.num_unusable_names) == (5, 2)
    assert read_summary(tmp_path / "c") == summary


@pytest.mark.parametrize("content", ["{}", "the very same"])
def test_rows_of_one_id_do_not_fill_memory(tmp_path, monkeypatch, content):
    """Cut by their ids they would all lie in one bucket, and copies of one row by any key."""
    corpus = [sample_of("1", content=content.format(n)) for n in range(200)]
    monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", 9)
    summary = write_shards(corpus, tmp_path / "c", rows_per_shard=50, duplicates="keep")
    assert (summary.num_shards, summary.num_duplicate_ids) == (4, 199)
    rows = shard_rows(tmp_path / "c")
    assert Counter(s.messages for _, s in rows) == Counter(s.messages for s in corpus)
    assert len({key for key, _ in rows}) == 200


def peak_of(folder: Path, rows: Iterator[Sample | RejectedRow]) -> int:
    """The most bytes that Python held while `rows` were written."""
    tracemalloc.start()
    write_shards(rows, folder, rows_per_shard=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(("name", "number"), [("{}", 3_000), ("the same", 1_000)])
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch, name, number):
    monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", 50)

    def rows(number: int) -> Iterator[Sample]:
        return (sample_of(name.format(n), content=f"{n} {'x' * 2_000}") for n in range(number))

    peak_of(tmp_path, rows(100))  # imports and caches
    # Half a megabyte of room for what a bucket costs; 700 rows more would be 1.5 MB.
    assert peak_of(tmp_path, rows(number)) < peak_of(tmp_path, rows(300)) + (1 << 19)


def test_memory_does_not_grow_with_the_rejected_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", 50)

    def rows(number: int) -> Iterator[RejectedRow]:
        return (RejectedRow("f", n, "d", "", "why", f"{n} {'x' * 1_000}") for n in range(number))

    # As above; 4,000 rows more would be 5 MB.
    assert peak_of(tmp_path, rows(6_000)) < peak_of(tmp_path, rows(2_000)) + (1 << 19)


def test_long_rows_fill_memory_sooner_and_make_smaller_shards(tmp_path, monkeypatch):
    for module in (buckets, normalize):
        monkeypatch.setattr(module, "MAX_CHARACTERS", 1_000)
    corpus = [sample_of(str(n), content=str(n % 10) * 400) for n in range(10)]
    summary = write_shards(corpus, tmp_path / "c", rows_per_shard=100)
    assert summary.num_shards == 4  # 404 characters a row: the third one reaches 1,000
    assert len(shard_rows(tmp_path / "c")) == 10


@pytest.mark.parametrize("number", [1, 999, 1_000, 1_001, 2_500])
def test_every_rejected_row_is_written_with_its_place_and_reason(tmp_path, number):
    summary = write_shards(
        [sample_of("1"), *rejected_rows(number)], tmp_path / "c", rows_per_shard=10
    )
    assert (summary.num_read, summary.num_rejected) == (number + 1, number)
    assert summary.read_by_dataset == {"d": number + 1}
    assert summary.first_rejected == "f:1: because 1"
    written = pq.read_table(tmp_path / "c" / "rejected.parquet").to_pylist()
    assert [RejectedRow(**row) for row in written] == rejected_rows(number)


def test_a_corpus_of_which_all_is_rejected_is_whole(tmp_path):
    summary = write_shards(rejected_rows(3), tmp_path / "c", rows_per_shard=10)
    assert summary == CorpusSummary(3, 3, 0, 0, {"d": 3}, "f:1: because 1")
    assert sorted(os.listdir(tmp_path / "c")) == ["rejected.parquet", "summary.json"]


def test_a_corpus_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="the corpus has no rows"):
        write_shards([], tmp_path / "c", rows_per_shard=10)
    assert read_summary(tmp_path / "c") is None


def test_an_interrupted_write_leaves_no_summary_and_can_be_done_again(tmp_path, monkeypatch):
    corpus = samples(30)

    def interrupted():
        yield from corpus[:20]
        yield rejected_rows(1)[0]
        raise DataError("f: cannot be read to its end")

    monkeypatch.setattr(buckets, "MAX_ROWS_IN_MEMORY", 3)
    with pytest.raises(DataError, match="to its end"):
        write_shards(interrupted(), tmp_path / "c", rows_per_shard=5)
    assert read_summary(tmp_path / "c") is None
    assert os.listdir(tmp_path / "c") == []  # neither half a file nor a bucket
    (tmp_path / "c" / "shard-000099.parquet").write_bytes(b"of a killed run")
    write_shards(corpus, tmp_path / "c", rows_per_shard=10)
    names = ["rejected.parquet", *(f"shard-00000{n}.parquet" for n in range(3)), "summary.json"]
    assert sorted(os.listdir(tmp_path / "c")) == names


def test_the_summary_is_written_last(tmp_path, monkeypatch):
    def fail(path: Path, content: object) -> None:
        assert len(list(tmp_path.glob("c/*.parquet"))) == 4
        raise OSError("disk full")

    monkeypatch.setattr(normalize, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shards(samples(30), tmp_path / "c", rows_per_shard=10)
    assert read_summary(tmp_path / "c") is None


def write_corpora(folder: Path) -> list[str]:
    """Three corpora of 150 rows together, with and without ids, in every kind of file."""
    texts = [f"{n % 97} {'x' * (n % 50)}" for n in range(110)]
    texts[105:] = texts[5:10]
    rows = [
        {"id": f"{n % 100}", "dataset": f"d{n % 2}", "text": text} for n, text in enumerate(texts)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    lines[10] = "no JSON\n"
    (folder / "a.jsonl").write_text("".join(lines[:60]))
    (folder / "many").mkdir()
    for number in range(5):
        part = lines[60 + 10 * number : 70 + 10 * number]
        (folder / "many" / f"{number}.jsonl").write_text("".join(part))
    table = pa.Table.from_pylist([{"text": f"without an id {n}"} for n in range(40)])
    pq.write_table(table, folder / "c.parquet", row_group_size=7)
    return [str(folder / name) for name in ("a.jsonl", "many", "c.parquet")]


def backwards(function, items):
    """A MapItems that does the last item first."""
    return iter([function(item) for item in items[::-1]][::-1])


@pytest.mark.parametrize("min_part_bytes", [1, 300, 1_500, 1 << 20])
def test_parts_of_corpora_give_the_shards_of_one_stream_of_rows(
    tmp_path, monkeypatch, min_part_bytes
):
    specs = write_corpora(tmp_path)
    split = partial(corpus_parts.split_corpora, min_part_bytes=min_part_bytes)
    monkeypatch.setattr(normalize, "split_corpora", split)
    whole = write_shards(read_corpora(specs), tmp_path / "a", rows_per_shard=32)
    parts = write_corpus(specs, tmp_path / "b", rows_per_shard=32, map_items=backwards)
    assert replace(parts, files={}) == whole
    assert (whole.num_read, whole.num_rejected, whole.num_shards) == (150, 1, 5)
    assert whole.num_duplicate_ids > 0
    assert whole.num_duplicates == whole.num_left_out == 5
    left_out = [pq.read_table(tmp_path / name / "duplicates.parquet") for name in "ab"]
    assert left_out[0] == left_out[1]
    assert left_out[0].num_rows == whole.num_left_out
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    rejected = [pq.read_table(tmp_path / name / "rejected.parquet") for name in "ab"]
    assert rejected[0] == rejected[1]
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))


@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_parts_have_the_subset_of_the_whole(tmp_path, monkeypatch, ratio):
    specs = write_corpora(tmp_path)
    monkeypatch.setattr(
        normalize, "split_corpora", partial(corpus_parts.split_corpora, min_part_bytes=300)
    )
    kept = keep_subset(read_corpora(specs), ratio=ratio)
    whole = write_shards(kept, tmp_path / "a", rows_per_shard=32)
    parts = write_corpus(specs, tmp_path / "b", rows_per_shard=32, subset_ratio=ratio)
    assert replace(parts, files={}) == whole
    assert 0 < whole.num_read < 150
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_a_subset_of_a_corpus_that_keeps_nothing_is_refused(tmp_path):
    specs = write_corpora(tmp_path)
    with pytest.raises(DataError, match="subset_ratio=1e-09 keeps none of the 149 rows"):
        write_corpus(specs, tmp_path / "b", rows_per_shard=32, subset_ratio=1e-9)
    assert os.listdir(tmp_path / "b") == []


def test_a_corpus_without_rows_among_others_is_refused(tmp_path):
    specs = write_corpora(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    specs.insert(1, str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows: every file is empty"):
        write_corpus(specs, tmp_path / "b", rows_per_shard=32)
    assert read_summary(tmp_path / "b") is None


@pytest.mark.parametrize(("num_rows", "num_digits"), [(95, 0), (96, 1), (1_535, 1), (1_536, 2)])
def test_shards_of_a_large_corpus_end_with_ranges_of_keys(
    tmp_path, monkeypatch, num_rows, num_digits
):
    monkeypatch.setattr(normalize, "SHARDS_PER_RANGE", 2)
    corpus = [sample_of(str(n), content=f"Because of {n}.") for n in range(num_rows)]
    written = write_shards(corpus, tmp_path / "a", rows_per_shard=3)
    keys = [key for key, _ in shard_rows(tmp_path / "a")]
    assert keys == sorted(row_key(sample) for sample in corpus)
    names = [
        f"shard-{digits}-{number:06d}.parquet" if digits else f"shard-{number:06d}.parquet"
        for digits, in_range in sorted(Counter(key[:num_digits] for key in keys).items())
        for number in range(-(-in_range // 3))
    ]
    assert sorted(path.name for path in (tmp_path / "a").glob("shard-*")) == names
    assert written.num_shards == len(names)


def test_rows_are_counted_while_they_are_read(tmp_path):
    rows, seen = [sample_of(str(n)) for n in range(12_000)], []

    def watched():
        for row in rows:
            seen.append(rows_read(tmp_path / "c"))
            yield row

    write_shards(watched(), tmp_path / "c", rows_per_shard=12_000)
    assert sorted(set(seen)) == [0, 5_000, 10_000]
    assert seen == sorted(seen)
    assert rows_read(tmp_path / "c") == 0  # with the buckets


def test_a_bucket_that_is_gone_is_told_and_not_passed_over(tmp_path):
    specs = write_corpora(tmp_path)

    def lose_a_file(function, items):
        answers = list(map(function, items))
        for file in sorted(tmp_path.glob("b/buckets-*/part-*/*.pickle"))[3:4]:
            file.unlink()
        return iter(answers)

    with pytest.raises(FileNotFoundError, match=r"\.pickle"):
        write_corpus(specs, tmp_path / "b", rows_per_shard=32, map_items=lose_a_file)
    assert read_summary(tmp_path / "b") is None
