"""Hub datasets as streams of samples; what the hub is refused with."""

import gzip
import json
import os
import sys
import time

import pytest

from selectmoe.data.readers import read_corpus
from tests.corpus_files import MESSAGES, jsonl, refusal, write


@pytest.fixture
def hub_folder(tmp_path):
    """A dataset as it is stored on the hub, with two splits."""
    folder = tmp_path / "org" / "name"
    rows = [{"id": "1", "messages": MESSAGES}, {"id": "2", "messages": MESSAGES[:1]}]
    for split, order in {"train": 1, "test": -1}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[::order])
        write(folder / f"{split}.jsonl", lines.encode())
    return folder


def test_a_hub_data_set_is_read_by_split(hub_folder):
    sample, row = read_corpus(f"hub:{hub_folder}")
    assert (sample.dataset, sample.sample_id, len(sample.messages)) == ("name", "1", 2)
    assert (row.file, row.row, row.reason) == (f"hub:{hub_folder}", 2, "no_assistant_turn")
    other_split = read_corpus(f"hub:{hub_folder}:test", max_row_bytes=5)
    assert [row.reason for row in other_split] == ["no_assistant_turn", "row_too_large"]
    complaint = refusal(f"hub:{hub_folder}:valid")
    assert (
        "could not be downloaded from the hub: Bad split: valid. Available splits: ['t" in complaint
    )


def test_the_hub_is_refused_within_seconds_without_a_network():
    started = time.monotonic()
    assert refusal("hub:no/such").startswith("hub:no/such: could not be downloaded from the hub: ")
    # Offline mode asks nobody; importing `datasets` takes most of the time.
    assert time.monotonic() - started < 20
    assert refusal("hub:") == "hub:: must be hub:NAME[:CONFIG][:SPLIT][@REVISION]"


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package `datasets`: pip install 'selectmoe[hub]'" in refusal("hub:a/b")


def test_a_reader_that_is_left_early_closes_its_file(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(*map(str, range(10_000)))))
    rows = read_corpus(str(path))
    assert next(rows).sample_id == "0"
    rows.close()
    open_files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert str(path) not in open_files
