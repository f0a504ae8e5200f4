"""The hash of a base's weights: equal for the same tensors, however they are split into files."""

import functools
import hashlib
from pathlib import Path

from selectmoe.model.checkpoint import HASH_CHUNK_BYTES, is_gguf
from selectmoe.model.gates_config import file_sha256
from selectmoe.model.weight_headers import TensorSpan, tensor_spans, weight_files

# A base with tied embeddings may be stored with a copy of them as its head; no gate reads a head.
HEAD = "lm_head."


def hash_base(base: Path) -> str:
    """SHA-256 over the tensors of a model folder, by name and without the language-model head; of
    a GGUF file over the file. Takes about a second a gigabyte, once a process.

    Raises ModelError where the folder has no .safetensors files, or one is not whole.
    """
    files = [base] if is_gguf(base) else weight_files(base)
    stats = [file.stat() for file in files]
    # Another size or time: another content.
    marks = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return _hash_files(tuple(files), marks)


@functools.lru_cache(maxsize=8)
def _hash_files(files: tuple[Path, ...], marks: tuple[tuple[int, int], ...]) -> str:
    del marks  # only a part of the key
    if is_gguf(files[0]):
        return file_sha256(files[0])
    spans = [
        (name, file, span)
        for file in files
        for name, span in tensor_spans(file).items()
        if not name.startswith(HEAD)
    ]
    digest = hashlib.sha256()
    for name, file, span in sorted(spans, key=lambda named: named[0]):
        digest.update(f"{name}\n{span.dtype}\n{list(span.shape)}\n".encode())
        _update(digest, file, span)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", file: Path, span: TensorSpan) -> None:
    with file.open("rb") as stream:
        stream.seek(span.start)
        left = span.end - span.start
        while left > 0:
            chunk = stream.read(min(left, HASH_CHUNK_BYTES))
            digest.update(chunk)
            left -= len(chunk)
