"""Checks a selector's weights before a run begins, by their headers alone; needs no torch."""

import math
from importlib.util import find_spec
from pathlib import Path

from selectmoe.errors import ModelError, list_names
from selectmoe.model.checkpoint import (
    ADAPTER_WEIGHTS_NAME,
    model_folder,
    read_json_object,
    weights_file,
)
from selectmoe.model.weight_headers import read_header, read_headers, weight_files

_HEAD = "lm_head."  # loaded for training only


def require_weights(model: str, checkpoint: str | Path | None = None) -> None:
    """Raises ModelError where weights of a model, or stage 1's, are missing, cut off or of another
    model. A hub model is downloaded first."""
    folder = model_folder(model)
    for file in weight_files(folder):
        read_header(file)
    if checkpoint is not None:
        _require_checkpoint(folder, weights_file(checkpoint))


def count_parameters(model: str, *, with_head: bool) -> int:
    """Number of parameters by the headers; with_head: the language-model head included."""
    return sum(
        math.prod(shape)
        for header in read_headers(model_folder(model))
        for name, shape in header.shapes.items()
        if with_head or not name.startswith(_HEAD)
    )


def _require_checkpoint(folder: Path, file: Path) -> None:
    if file.suffix == ".safetensors":
        shapes = read_header(file).shapes
    else:  # a pickle has no header
        from selectmoe.model.gate_weights import read_gate_weights

        shapes = {name: tuple(t.shape) for name, t in read_gate_weights(file)[0].items()}
    if file.name == ADAPTER_WEIGHTS_NAME:
        if find_spec("peft") is None:
            raise ModelError(f"{file}: a LoRA adapter needs `pip install peft`")
        return
    found = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    expected = _quality_gates(folder)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(f"{file}: lacks {list_names(missing, most=1)}, a quality gate of {folder}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelError(
                f"{file}: {name!r} must have the shape {shape} of {folder}, got {found[name]}"
            )


def _quality_gates(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the gates that a Select-MoE has by its config.json."""
    config = read_json_object(folder / "config.json")
    num_layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if not isinstance(num_layers, int) or not isinstance(hidden, int):
        return {}
    return {
        f"layers.{layer}.mlp.quality_gate.{part}": shape
        for layer in range(num_layers)
        for part, shape in (("weight", (2, hidden)), ("bias", (2,)))
    }
