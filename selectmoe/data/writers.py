"""Files that are whole or absent: written under another name, renamed last."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def write_json(path: Path, content: object) -> None:
    """One JSON document, indented for people."""
    _write_whole(path, lambda file: _dump(file, content))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """One JSON object a line; returns how many. `rows` may be a generator: memory stays flat."""
    num_rows = 0

    def write(file: IO[bytes]) -> None:
        nonlocal num_rows
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            num_rows += 1

    _write_whole(path, write)
    return num_rows


def write_parquet(path: Path, table: pa.Table) -> None:
    _write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"))


def _dump(file: IO[bytes], content: object) -> None:
    file.write(json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8") + b"\n")


def _write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # The process id keeps two writers of one name (a retried task beside a slow one) apart.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the bytes
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
