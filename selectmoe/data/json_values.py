"""Splits the text of a .json file into its values, without holding the file: the elements of one
array, or objects that follow each other, over any number of lines."""

import re
from collections.abc import Iterable, Iterator

from selectmoe.data.byte_streams import without_mark
from selectmoe.errors import DataError

_STRUCTURE = re.compile(rb'["\[\]{},]')
_BACKSLASH = ord("\\")
_KEPT_BYTES = 100  # of a value over the limit


def split_values(chunks: Iterable[bytes], limit: int, path: str) -> Iterator[tuple[bytes, int]]:
    """Yields (value, its size in bytes); of a value over the limit only the beginning.

    Values are found by their brackets alone, so a value that is not valid JSON costs itself only.
    Raises DataError where the array, or the last object, does not end.
    """
    splitter = _Splitter(limit, path)
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.finish()


class _Splitter:
    """The state between two chunks."""

    def __init__(self, limit: int, path: str) -> None:
        self.limit = limit
        self.path = path
        self.buffer = b""  # the value that has begun, as far as it was read
        self.scanned = 0  # bytes of the buffer that were looked at
        self.head, self.num_dropped = b"", 0  # of a value over the limit
        self.in_string = False
        self.depth = 0  # of brackets
        self.base: int | None = None  # depth between values: 1 in an array, 0 without one
        self.is_closed = False  # the array has ended

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, int]]:
        if self.base is None and not self.buffer:
            chunk = without_mark(chunk)
        self.buffer += chunk
        start = 0
        while (mark := self._next_mark()) is not None:
            begin, end = start, self._step(mark)
            if end is not None:
                start = self.scanned
                yield from self._value(self.buffer[begin:end])
        self._keep(start)

    def finish(self) -> Iterator[tuple[bytes, int]]:
        if self.is_closed and self.buffer.strip():
            raise DataError(f"{self.path}: there is text after the end of its array")
        if not self.is_closed and (self.base or self.depth):
            what = "array" if self.base else "object"
            raise DataError(f"{self.path}: cannot be read to its end: its {what} is not closed")
        yield from self._value(self.buffer)

    def _next_mark(self) -> bytes | None:
        """The next bracket or comma outside of strings; None where the buffer ends before."""
        while True:
            if self.in_string and not self._leave_string():
                return None
            match = _STRUCTURE.search(self.buffer, self.scanned)
            if match is None:
                self.scanned = len(self.buffer)
                return None
            self.scanned = match.end()
            if match[0] != b'"':
                return match[0]
            self.in_string = True

    def _leave_string(self) -> bool:
        """Goes behind the quotation mark that ends a string; False where the buffer ends before."""
        quote = self.buffer.find(b'"', self.scanned)
        while quote >= 0:
            escapes = self._backslashes_before(quote)
            if escapes % 2 == 0:
                self.scanned = quote + 1
                self.in_string = False
                return True
            quote = self.buffer.find(b'"', quote + 1)
        # Backslashes at the end are looked at again with what follows them.
        self.scanned = len(self.buffer) - self._backslashes_before(len(self.buffer))
        return False

    def _backslashes_before(self, end: int) -> int:
        start = end
        while start > self.scanned and self.buffer[start - 1] == _BACKSLASH:
            start -= 1
        return end - start

    def _step(self, mark: bytes) -> int | None:
        """Takes a mark into account; the end of the value if one ends here, which may be empty."""
        before = self.scanned - 1
        if self.is_closed:
            raise DataError(f"{self.path}: there is text after the end of its array")
        if self.base is None:
            self.base = 1 if mark == b"[" else 0
            if mark == b"[":
                self.depth = 1
                return before  # what stands before the array, which is nothing
        if mark in b"[{":
            self.depth += 1
            return None
        if mark == b",":
            return before if self.depth == self.base else None
        self.depth -= 1
        if self.depth < 1 and self.base == 1:
            self.is_closed = True
            return before
        return self.scanned if self.depth == 0 else None

    def _value(self, value: bytes) -> Iterator[tuple[bytes, int]]:
        stripped = value.strip()
        if self.num_dropped:
            yield self.head, self.num_dropped + len(value)
        elif stripped:
            yield stripped, len(stripped)
        self.head, self.num_dropped = b"", 0

    def _keep(self, start: int) -> None:
        """Keeps what is left of the buffer from `start` on, unless it is over the limit."""
        rest = self.buffer[start:]
        scanned = self.scanned - start
        if len(rest.lstrip()) > self.limit:
            self.head = self.head or rest.lstrip()[:_KEPT_BYTES]
            self.num_dropped += scanned
            rest, scanned = rest[scanned:], 0
        self.buffer, self.scanned = rest, scanned
