"""Files are whole or absent, and hold what any JSON or parquet reader understands."""

import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.data.writers import whole_file, write_json, write_jsonl, write_parquet

ROWS = [{"id": "ä\u2028\0", "n": 1}, {"id": "\U0001f600\n", "n": None}]


def test_a_reader_gets_back_what_was_written(tmp_path):
    assert write_jsonl(tmp_path / "a.jsonl", iter(ROWS)) == 2
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:2]] == ROWS
    assert lines[2:] == [b""]  # the last line has an end, and no other line break is bare
    write_json(tmp_path / "a.json", {"rows": ROWS})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"rows": ROWS}
    table = pa.Table.from_pylist(ROWS)
    write_parquet(tmp_path / "a.parquet", table)
    assert pq.read_table(tmp_path / "a.parquet") == table
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl", "a.parquet"]


def test_no_rows_give_an_empty_file(tmp_path):
    assert write_jsonl(tmp_path / "a.jsonl", []) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def broken_rows():
    yield from ROWS * 10_000  # more than any buffer holds
    raise KeyError("a row that cannot be had")


@pytest.mark.parametrize("before", [None, b"what an earlier run wrote\n"])
def test_a_failure_leaves_what_was_there_before(tmp_path, before):
    path = tmp_path / "a.jsonl"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(KeyError):
        write_jsonl(path, broken_rows())
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"bytes": b""})
    assert os.listdir(tmp_path) == ([] if before is None else ["a.jsonl"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_lacks_is_refused(tmp_path, number):
    for write in (write_json, lambda path, row: write_jsonl(path, [row])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(tmp_path / "a.json", {"loss": number})
    assert os.listdir(tmp_path) == []


def test_the_name_appears_only_when_the_bytes_are_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    synced = []

    def fsync(descriptor: int) -> None:
        assert not path.exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    write_jsonl(path, ROWS)
    assert synced == [path.stat().st_size]


def test_two_writers_of_one_name_do_not_mix(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with whole_file(path) as slow:
        slow.write(b"slow ")
        monkeypatch.setattr(os, "getpid", lambda: -1)  # another process, as far as names go
        with whole_file(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
        slow.write(b"but whole")
    assert path.read_bytes() == b"slow but whole"
    assert os.listdir(tmp_path) == ["a"]


def test_a_killed_process_leaves_no_file_of_that_name(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from selectmoe.data.writers import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    # What is left begins with a dot, which readers pass over.
    assert [name[:3] for name in os.listdir(tmp_path)] == [".a."]
