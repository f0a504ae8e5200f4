"""The rows of .csv and .tsv files, whose columns are named like the keys of a row."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from selectmoe.data.byte_streams import without_mark
from selectmoe.errors import DataError

_LARGEST_FIELD = (1 << 31) - 1  # a C long, which has 32 bits on some machines


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One row of a table in text."""

    line: int  # on which it begins; the header is line 1 of most files
    cells: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # why it cannot be used, or empty
    detail: str = ""
    size: int = 0  # bytes, where it is over the limit


def split_rows(
    lines: Iterable[tuple[bytes, int]], path: str, *, delimiter: str, limit: int
) -> Iterator[CsvRow]:
    """The rows below the header. An empty cell is no value (None).

    lines: each with its size, as `split_lines` gives them.
    Raises DataError for a header that names a column twice.
    """
    # Python's default refuses a cell of more than 131,072 characters.
    csv.field_size_limit(_LARGEST_FIELD)
    source = _Lines(lines, limit)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first_line = source.num_lines + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            detail = f"row at line {first_line} is not valid CSV: {error}"
            yield CsvRow(first_line, reason="invalid_csv", detail=detail)
            continue
        if source.too_large:
            yield CsvRow(first_line, size=source.too_large)
            source.too_large = 0
        elif not any(cells):
            continue
        elif header is None:
            header = [name.strip() for name in cells]
            require_unique(header, path)
        else:
            yield _row(first_line, header, cells)


class _Lines(Iterator[str]):
    """Lines as the csv module takes them: text that ends in a line feed."""

    def __init__(self, lines: Iterable[tuple[bytes, int]], limit: int) -> None:
        self.lines = iter(lines)
        self.limit = limit
        self.num_lines = 0
        self.too_large = 0  # size of a line over the limit since this was last set to 0

    def __next__(self) -> str:
        line, size = next(self.lines)
        self.num_lines += 1
        if size > self.limit:
            self.too_large = size
            return "\n"
        # Bytes that are no UTF-8 become surrogates, by which `_row` knows them.
        return without_mark(line).decode("utf-8", "surrogateescape") + "\n"


def _row(line: int, header: list[str], cells: list[str]) -> CsvRow:
    if len(cells) != len(header):
        detail = f"row at line {line} must have {len(header)} columns, got {len(cells)}"
        return CsvRow(line, reason="wrong_number_of_columns", detail=detail)
    if not all(map(_is_utf8, cells)):
        return CsvRow(line, reason="invalid_utf8", detail=f"row at line {line} is not valid UTF-8")
    return CsvRow(line, {name: _value(cell) for name, cell in zip(header, cells, strict=True)})


def _value(cell: str) -> object:
    """The text of a cell; None where it is empty; a list where it is one in JSON, since a table in
    text has no other way to hold messages."""
    if cell.startswith("[{") or cell.startswith("[["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell or None


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def require_unique(header: Sequence[str], path: str) -> None:
    """Raises DataError for a table that has two columns of one name: a row would keep the last."""
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(f"{path}: names of columns must be unique, got {min(twice)!r} twice")
