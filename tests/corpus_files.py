"""Files of a corpus for tests of its readers, and what reading them gives."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.data.readers import read_corpus
from selectmoe.errors import DataError
from selectmoe.records import Sample

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def jsonl(*names: str) -> bytes:
    """A row with each name as its id."""
    return "".join(json.dumps({"id": name, "text": "Because."}) + "\n" for name in names).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def ids(spec: object) -> list[str]:
    rows = list(read_corpus(str(spec)))
    assert all(isinstance(row, Sample) for row in rows), rows
    return [row.sample_id for row in rows]


def refusal(spec: object) -> str:
    """What the corpus is refused with: one line that begins with what was asked for."""
    with pytest.raises(DataError) as caught:
        list(read_corpus(str(spec)))
    assert "\n" not in str(caught.value)
    return str(caught.value)
