"""The bytes of a file in chunks, decompressed: the layer below all formats of text."""

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
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
_LFS_POINTER = b"version https://git-lfs"
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
        chunks = _DECOMPRESSORS[ending.compression](raw)
        try:
            chunk = next(chunks, b"")
        except Exception:
            require_no_pointer(filesystem, path)
            raise
        for beginning, complaint in _NOT_TEXT.items():
            if chunk.startswith(beginning):
                raise DataError(f"{path}: {complaint.format(ending=ending.text)}")
        if chunk.startswith(_LFS_POINTER):
            require_no_pointer(filesystem, path)
        yield from chain([chunk] if chunk else [], chunks)


def require_no_pointer(filesystem: pafs.FileSystem, path: str) -> None:
    """Raises DataError where a repository was cloned without its large files."""
    with filesystem.open_input_stream(path, compression=None) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise DataError(
                f"{path}: is a pointer of Git LFS instead of the file; git lfs pull downloads it"
            )


def _read_all(stream: Any) -> Iterator[bytes]:  # noqa: ANN401 (any binary file)
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _read_streams(new_decompressor: Callable[[], Any], raw: pa.NativeFile) -> Iterator[bytes]:
    """The compressed streams of a file, one after the other.

    Python's BZ2File and LZMAFile end without an error where something else follows a stream.
    """
    number, rest = 0, raw.read(CHUNK_BYTES)
    while rest:
        number += 1
        decompressor = new_decompressor()
        while not decompressor.eof:
            if decompressor.needs_input and not rest:
                rest = raw.read(CHUNK_BYTES)
                if not rest:
                    raise EOFError("it ends within a compressed stream")
            try:
                text = decompressor.decompress(rest, CHUNK_BYTES)
            except (OSError, lzma.LZMAError) as error:
                raise OSError(f"compressed stream {number} is none: {error}") from error
            rest = b""
            if text:
                yield text
        rest = decompressor.unused_data.lstrip(b"\0")  # xz may be padded
        while not rest and (chunk := raw.read(CHUNK_BYTES)):
            rest = chunk.lstrip(b"\0")


_DECOMPRESSORS: dict[str | None, Callable[[Any], Iterator[bytes]]] = {
    None: _read_all,
    "gzip": lambda raw: _read_all(gzip.GzipFile(fileobj=raw)),
    "bz2": partial(_read_streams, bz2.BZ2Decompressor),
    "xz": partial(_read_streams, lzma.LZMADecompressor),
    "zstd": lambda raw: _read_all(pa.CompressedInputStream(raw, "zstd")),
}


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
