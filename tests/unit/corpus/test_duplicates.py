"""Exact duplicates: the first by row key of each text stays, however the corpus is split."""

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from selectmoe.corpus import duplicates, normalize
from selectmoe.corpus import parts as corpus_parts
from selectmoe.corpus.duplicates import (
    TextHashWriter,
    duplicate_keys,
    hash_ranges,
    keys_in_order,
    write_duplicates,
)
from selectmoe.corpus.normalize import write_corpus, write_shards
from selectmoe.corpus.shards import read_shard, row_hashes, row_key
from selectmoe.records import Message, Sample


def sample_of(name: str, text: str, dataset: str = "d") -> Sample:
    return Sample(dataset, name, (Message("user", "Why?"), Message("assistant", text)), f"f:{name}")


def shard_rows(folder: Path) -> list[tuple[str, Sample]]:
    return [row for file in sorted(folder.glob("shard-*.parquet")) for row in read_shard(file)]


def test_of_rows_with_one_text_the_first_by_key_stays_and_the_others_are_written_down(tmp_path):
    corpus = [sample_of(str(n), f"text {n % 7}", f"d{n % 2}") for n in range(100)]
    summary = write_shards(corpus, tmp_path / "c", rows_per_shard=4)
    kept = [sample for _, sample in shard_rows(tmp_path / "c")]
    first = {}
    for sample in sorted(corpus, key=row_key):
        first.setdefault(sample.messages, sample)
    assert kept == sorted(first.values(), key=row_key)
    assert (summary.num_read, summary.num_rows, summary.num_left_out) == (100, 7, 93)
    left_out = pq.read_table(tmp_path / "c" / "duplicates.parquet").to_pylist()
    assert Counter(row["dataset"] for row in left_out) == summary.duplicates_by_dataset
    assert {row["source"] for row in left_out} == {s.source for s in corpus} - {
        s.source for s in kept
    }


def test_the_text_alone_decides(tmp_path):
    corpus = [
        sample_of("1", "a"),
        sample_of("2", "a "),
        sample_of("3", "A"),
        Sample("d", "4", (Message("user", "Why?a"), Message("assistant", ""))),
        Sample("d", "5", (Message("system", "Why?"), Message("assistant", "a"))),
        Sample("d", "6", (Message("assistant", "a"),)),
    ]
    assert write_shards(corpus, tmp_path / "c", rows_per_shard=9).num_duplicates == 0
    assert row_hashes(corpus[0])[1] == row_hashes(sample_of("x", "a", "other"))[1]
    assert all(row_hashes(sample)[0] == row_key(sample) for sample in corpus)
    assert not (tmp_path / "c" / "duplicates.parquet").exists()


@pytest.mark.parametrize("rows_per_range", [2, 40, 1 << 22])
@pytest.mark.parametrize("rows_per_run", [3, 1 << 20])
def test_duplicates_are_found_in_runs_and_ranges_of_any_size(
    tmp_path, monkeypatch, rows_per_range, rows_per_run
):
    monkeypatch.setattr(duplicates, "ROWS_PER_RANGE", rows_per_range)
    monkeypatch.setattr(duplicates, "ROWS_PER_RUN", rows_per_run)
    draw = random.Random(0)
    rows = [(draw.randbytes(16).hex(), draw.choice([b"\0", b"\xff", b"7"]) * 15 + bytes([n % 40]))
            for n in range(300)]  # fmt: skip
    rows += rows[:20]  # the same key, too
    writers = [TextHashWriter(tmp_path / f"part-{number}") for number in range(4)]
    for number, (key, text) in enumerate(rows):
        writers[number % 3].add(key, text)  # the last part is empty
    parts = [writer.close() for writer in writers]
    find = partial(write_duplicates, parts=parts, folder=tmp_path)
    files = [find(first_bytes) for first_bytes in hash_ranges(parts)]
    lowest = {text: min(key for key, other in rows if other == text) for _, text in rows}
    expected = sorted({key for key, text in rows if key != lowest[text]})
    assert list(keys_in_order(files, "")) == expected
    by_digits = [keys_in_order(files, f"{digit:x}") for digit in range(16)]
    assert [key for keys in by_digits for key in keys] == expected


def test_no_rows_have_no_duplicates():
    assert hash_ranges([]) == []
    assert list(keys_in_order([], "")) == []
    assert duplicate_keys(np.empty((0, 4), np.uint64)).shape == (0, 2)


@pytest.mark.parametrize("rule", ["drop", "keep"])
@pytest.mark.parametrize("min_part_bytes", [100, 1 << 20])
def test_the_partition_of_a_corpus_does_not_matter(tmp_path, monkeypatch, rule, min_part_bytes):
    monkeypatch.setattr(duplicates, "ROWS_PER_RANGE", 16)
    monkeypatch.setattr(
        normalize,
        "split_corpora",
        partial(corpus_parts.split_corpora, min_part_bytes=min_part_bytes),
    )
    rows = [{"id": f"{n}", "dataset": "d", "text": f"text {n * n % 41}"} for n in range(120)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jsonl").write_text("".join(lines))
    (tmp_path / "many").mkdir()
    random.Random(0).shuffle(lines)
    for number in range(6):
        (tmp_path / "many" / f"{number}.jsonl").write_text("".join(lines[number::6]))
    found = []
    for name in ("one", "many"):
        folder = tmp_path / f"{name}-shards"
        write_corpus([str(tmp_path / name)], folder, rows_per_shard=8, duplicates=rule)
        found.append([(key, sample.sample_id) for key, sample in shard_rows(folder)])
    assert found[0] == found[1]
    assert len(found[0]) == (21 if rule == "drop" else 120)
