"""Reads the .safetensors files of a model folder: names and shapes of tensors, single tensors.

OLMoE's experts come in two layouts, and both are read here by the names of the first:

    hub     model.layers.0.mlp.experts.3.gate_proj.weight  [I, H]   three tensors an expert
    fused   model.layers.0.mlp.experts.gate_up_proj     [E, 2I, H]  two tensors a layer

Shape letters: E = experts, H = hidden, I = intermediate.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selectmoe.errors import ModelError, list_names
from selectmoe.model.weight_headers import weight_files

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight"
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, …


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by name; only headers are read.

    Raises ModelError where a file is missing or corrupt, or two files have the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, stored in _header(file).items():
            if name in tensors:
                raise ModelError(f"{file}: holds {name!r}, which {tensors[name].file} also holds")
            tensors[name] = stored
    return tensors


def num_stored_parameters(folder: Path) -> int:
    """The number of parameters in the weight files of a model folder, from their headers."""
    return sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())


def hub_tensors(fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the hub's layout: experts as views into the fused tensors."""
    split: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        experts, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for number, gate_and_up in enumerate(tensor.unbind()):
                gate, up = gate_and_up.chunk(2)
                split[f"{experts}.{number}.gate_proj.weight"] = gate
                split[f"{experts}.{number}.up_proj.weight"] = up
        elif part == "down_proj":
            for number, down in enumerate(tensor.unbind()):
                split[f"{experts}.{number}.down_proj.weight"] = down
        else:
            split[name] = tensor
    return split


def require_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], fused: Mapping[str, Tensor], *, tied: bool
) -> None:
    """Raises ModelError, with names, unless the folder has exactly the tensors of `fused`, in
    either layout; with tied embeddings the head may be missing."""
    expected: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        expected |= {name: tensor} if name in stored else hub_tensors({name: tensor})
    missing = expected.keys() - stored.keys() - ({HEAD} if tied else set())
    unexpected = stored.keys() - expected.keys()
    wrong = [f"lacks {list_names(sorted(missing), most=3)}"] if missing else []
    if unexpected:
        names = list_names(sorted(unexpected), most=3)
        wrong.append(f"has {names}, which no such model has")
    wrong += [
        f"{name!r} must have the shape {list(expected[name].shape)} by config.json, "
        f"got {list(found.shape)}"
        for name, found in stored.items()
        if name in expected and found.shape != expected[name].shape
    ][:1]
    if wrong:
        raise ModelError(f"{folder}: {'; '.join(wrong)}")


def common_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds every tensor without loss, usually the one that all have."""
    names = sorted({tensor.dtype for tensor in stored.values()})
    for name in names:
        if name not in _DTYPES:
            file = next(tensor.file for tensor in stored.values() if tensor.dtype == name)
            raise ModelError(f"{file}: dtype must be one of {', '.join(_DTYPES)}, got {name}")
    return functools.reduce(torch.promote_types, [_DTYPES[name] for name in names])


class TensorReader:
    """Reads single tensors of a folder by their names in the hub's layout."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._files: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor: of fused experts the slice of one, of a tied head the embedding."""
        if name == HEAD and name not in self.stored:
            name = EMBEDDING
        if name in self.stored:
            whole: Tensor = self._open(name).get_tensor(name)
            return whole
        expert = _EXPERT.fullmatch(name)
        assert expert is not None, name
        number, part = int(expert["number"]), expert["part"]
        fused = f"{expert['experts']}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        tensor: Tensor = self._open(fused).get_slice(fused)[number]
        if part == "down":
            return tensor
        return tensor.chunk(2)[0 if part == "gate" else 1]

    def _open(self, name: str) -> Any:  # noqa: ANN401 (safetensors does not type its handles)
        file = self.stored[name].file
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt")
        return self._files[file]


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable weights file: {error}") from error
