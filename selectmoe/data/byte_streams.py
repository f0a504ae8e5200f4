"""The bytes of a file in chunks, decompressed: the layer below all formats of text."""

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from selectmoe.data.endings import require_ending
from selectmoe.errors import DataError, one_line

CHUNK_BYTES = 1 << 20
# How files begin that cannot be text in UTF-8, whatever their names say.
_NOT_TEXT = {
    b"\x1f\x8b": "is gzip-compressed: its name must end in {ending}.gz",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed: its name must end in {ending}.zst",
    b"\xfd7zXZ\x00": "is xz-compressed: its name must end in {ending}.xz",
    b"BZh9": "is bzip2-compressed: its name must end in {ending}.bz2",
    b"PAR1": "is a parquet file: its name must end in .parquet",
    b"ARROW1": "is an Arrow file: its name must end in .arrow",
    b"PK\x03\x04": "is a zip archive: unpack it",
    codecs.BOM_UTF16_LE: "must be UTF-8, is UTF-16",
    codecs.BOM_UTF16_BE: "must be UTF-8, is UTF-16",
}
_DECOMPRESSORS: dict[str | None, Callable[[Any], Any]] = {
    None: lambda raw: raw,
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": lambda raw: pa.CompressedInputStream(raw, "zstd"),
}
T = TypeVar("T")


def read_chunks(filesystem: pafs.FileSystem, path: str, *, begin: int = 0) -> Iterator[bytes]:
    """The text of a file from the byte `begin` on, which must be 0 where it is compressed."""
    if begin:
        with filesystem.open_input_file(path) as file:
            file.seek(begin)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    ending = require_ending(path)
    # Buffered: gzip reads a few kilobytes at a time, and each would be a request to the store.
    with filesystem.open_input_stream(path, compression=None, buffer_size=CHUNK_BYTES) as raw:
        stream = _DECOMPRESSORS[ending.compression](raw)
        chunk = stream.read(CHUNK_BYTES)
        for beginning, complaint in _NOT_TEXT.items():
            if chunk.startswith(beginning):
                raise DataError(f"{path}: {complaint.format(ending=ending.text)}")
        while chunk:
            yield chunk
            chunk = stream.read(CHUNK_BYTES)


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Yields (line, its size in bytes); of a line over the limit only the beginning.

    Never holds more of a line than `limit` and a chunk.
    """
    rest, size = b"", 0
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield rest + line, size + len(line)
            rest, size = b"", 0
        size += len(last)
        rest = rest + last if size <= limit else (rest + last)[:100]
    if size:
        yield rest, size


def without_mark(line: bytes) -> bytes:
    """The line without byte order marks before it: a file that was joined from others has one at
    each seam."""
    while line.startswith(codecs.BOM_UTF8):
        line = line.removeprefix(codecs.BOM_UTF8)
    return line


def translate_errors(items: Iterable[T], complaint: str) -> Iterator[T]:
    """Yields `items`; an exception of their source becomes a DataError beginning with `complaint`.

    Clients of object stores and of the hub raise dozens of types, many of them not an OSError.
    """
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{complaint}: {one_line(error)}") from error
        yield item
