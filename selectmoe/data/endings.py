"""Which format and which compression the ending of a file's name stands for."""

import re
from dataclasses import dataclass
from typing import Literal

from selectmoe.errors import DataError

Format = Literal["lines", "json", "csv", "tsv", "parquet", "arrow"]
FORMATS: dict[str, Format] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
BINARY: tuple[Format, ...] = ("parquet", "arrow")  # compressed inside
READABLE = f"{', '.join(FORMATS)} (text also with .gz, .zst, .bz2 or .xz)"
_ENDING = re.compile(
    rf"({'|'.join(map(re.escape, FORMATS))})({'|'.join(map(re.escape, COMPRESSIONS))})?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """The ending of a readable file's name."""

    text: str  # as the name has it, ".JSONL.gz"
    format: Format
    compression: str | None  # "gzip", "zstd", "bz2" or "xz"


def find_ending(path: str) -> Ending | None:
    """The ending of a readable file's name, in any case; None for other files."""
    last, before = path.rfind("."), path.rfind(".", 0, max(path.rfind("."), 0))
    for start in {before, last} - {-1}:
        match = _ENDING.fullmatch(path, start)
        if match is not None:
            name, compression = FORMATS[match[1].lower()], (match[2] or "").lower()
            if not (compression and name in BINARY):
                return Ending(match[0], name, COMPRESSIONS.get(compression))
    return None


def require_ending(path: str) -> Ending:
    """Raises DataError for a file whose name says no format that is read."""
    ending = find_ending(path)
    if ending is None:
        raise DataError(f"{path}: file name must end in {READABLE}")
    return ending


def without_ending(path: str) -> str:
    ending = find_ending(path)
    return path.removesuffix(ending.text) if ending else path
