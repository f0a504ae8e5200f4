"""The headers of .safetensors files, read without torch: names, shapes, whether files are whole.

header = 8 bytes (its length), then JSON: {"name": {"dtype": "F32", "shape": [2, 8],
"data_offsets": [0, 64]}, …, "__metadata__": {…}}; then the tensors' bytes
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe.errors import ModelError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class WeightHeader:
    """What a file says of its tensors."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    spans: dict[str, "TensorSpan"]


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor: its dtype as safetensors writes it, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / INDEX_NAME
    if not index.is_file():
        pickles = any(folder.glob("*.bin"))
        hint = "; load it with transformers and save it again" if pickles else ""
        raise ModelError(f"{folder}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}{hint}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of weights: {error!r}") from error
    files = [folder / name for name in sorted(map(str, names))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index}: names {file.name}, which is missing")
    return files


def read_headers(folder: Path) -> Iterator[WeightHeader]:
    """Of every weights file of a model folder. Raises ModelError as `read_header` does."""
    return map(read_header, weight_files(folder))


def read_header(file: Path) -> WeightHeader:
    """Raises ModelError where the file is no .safetensors file or is cut off; reads no tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        rest = start + stream.read(len(_LFS_POINTER) - len(start))
        if rest == _LFS_POINTER:
            raise ModelError(f"{file}: a pointer of Git LFS instead of weights; run 'git lfs pull'")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{file}: not a readable weights file: it has no header; is it whole?")
        stream.seek(8)
        header = _entries(file, stream.read(length))
    metadata = header.pop("__metadata__", {})
    try:
        spans = {name: _span(entry, offset=8 + length) for name, entry in header.items()}
        end = max((span.end for span in spans.values()), default=8 + length)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"{file}: not a readable weights file: {error!r}") from error
    if size != end:
        raise ModelError(
            f"{file}: not whole: it has {size:,} bytes, and its header describes {end:,}"
        )
    shapes = {name: span.shape for name, span in spans.items()}
    return WeightHeader(shapes, dict(metadata), spans)


def tensor_spans(file: Path) -> dict[str, TensorSpan]:
    """Where the tensors of a file are. Raises ModelError as `read_header` does."""
    return read_header(file).spans


def _span(entry: dict[str, Any], *, offset: int) -> TensorSpan:
    start, end = map(int, entry["data_offsets"])
    shape = tuple(map(int, entry["shape"]))
    return TensorSpan(
        dtype=str(entry["dtype"]), shape=shape, start=offset + start, end=offset + end
    )


def _entries(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{file}: not a readable weights file: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file}: not a readable weights file: its header is no JSON object")
    return header
