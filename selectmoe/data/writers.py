"""Writes files that are whole or absent: under a temporary name first, renamed last."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into; it becomes `path` when the block ends, and is deleted on an error."""
    # The process id keeps two writers of one name (a retried task beside a slow one) apart.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and not error.filename:
            error.filename = str(path)  # a failed write does not name its file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """One JSON document, indented for people; NaN and infinity, which JSON lacks, are refused."""
    with whole_file(path) as file:
        file.write(_encoded(content, indent=2))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """One JSON object a line; returns how many. `rows` may be a generator: memory stays flat."""
    num_rows = 0
    with whole_file(path) as file:
        for row in rows:
            file.write(_encoded(row))
            num_rows += 1
    return num_rows


def write_parquet(path: Path, table: pa.Table) -> None:
    with whole_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def _encoded(content: object, *, indent: int | None = None) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a column of a corpus: only its escape is valid
        return json.dumps(content, allow_nan=False, indent=indent).encode("ascii") + b"\n"
