"""gates_config.json: which base a set of quality gates was made for, read without torch.

A selector folder holds the gates of a base, which itself is elsewhere:

    gates.safetensors    layers.N.weight [2, H] and layers.N.bias [2], float32; row 0 is "good"
    gates_config.json    GatesConfig
    calibration.json     length adjustment and quantiles (`scoring.calibration`); optional
    README.md            the card

Shape letters: H = hidden size of the base.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from selectmoe.data.writers import write_json
from selectmoe.errors import ModelError
from selectmoe.model.checkpoint import HASH_CHUNK_BYTES, read_json_object

GATES_NAME = "gates.safetensors"
GATES_CONFIG_NAME = "gates_config.json"
# Names of the same number in the configurations of transformers' models.
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShape:
    """What a base must have in common with the one that gates were made for."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> "BaseShape | None":
        """Of the content of config.json; None where it does not describe decoder layers."""
        text = settings.get("text_config")  # of a model that also reads images
        inner = text if isinstance(text, Mapping) else settings
        hidden_size = next((inner[name] for name in _HIDDEN_SIZES if name in inner), None)
        num_layers = next((inner[name] for name in _LAYER_COUNTS if name in inner), None)
        if not isinstance(hidden_size, int) or not isinstance(num_layers, int):
            return None
        return cls(
            model_type=str(settings.get("model_type")),
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesConfig:
    """The base of a set of gates, and the layers that have one. Raises ModelError where a value
    breaks a rule."""

    base: str
    """Name on the hub, or a folder or GGUF file; a relative path begins at the selector folder."""
    revision: str | None = None
    """Branch, tag or commit of a name on the hub."""
    base_sha256: str
    """`base_weights.hash_base` of the weights that the gates were trained on."""
    other_base_sha256: Mapping[str, str] = field(default_factory=dict)
    """Hashes of other forms of the same weights that the gates may read as well -> description,
    such as another dtype."""
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    layers: tuple[int, ...]
    """Layers with a gate, ascending from 0; nothing above the last one is computed."""
    gates_sha256: str = ""
    """SHA-256 of gates.safetensors; set when it is written."""

    def __post_init__(self) -> None:
        for name in ("base", "base_sha256", "model_type"):
            value = getattr(self, name)
            _require(isinstance(value, str) and value != "", name, "text", value)
        for name in ("hidden_size", "num_hidden_layers"):
            value = getattr(self, name)
            _require(_is_index(value) and value >= 1, name, "an integer, at least 1", value)
        layers, highest = self.layers, self.num_hidden_layers - 1
        in_range = all(_is_index(layer) and layer <= highest for layer in layers)
        ascending = list(layers) == sorted(set(layers))
        rule = f"layers from 0 to {highest}, ascending, at least one"
        _require(bool(layers) and in_range and ascending, "layers", rule, list(layers))
        revision, others = self.revision, self.other_base_sha256
        _require(revision is None or isinstance(revision, str), "revision", "text", revision)
        _require(isinstance(others, Mapping), "other_base_sha256", "a JSON object", others)

    @property
    def shape(self) -> BaseShape:
        return BaseShape(
            model_type=self.model_type,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
        )

    @property
    def base_name(self) -> str:
        """The base as `--model` takes it."""
        return f"{self.base}@{self.revision}" if self.revision else self.base

    def require_shape(self, shape: BaseShape | None, base: str, gates: Path) -> None:
        """Raises ModelError, with both values, where a base has another shape than the one that
        the gates of the folder `gates` were made for."""
        if shape is None:
            raise ModelError(f"{base}: its config.json names no hidden size and number of layers")
        for name in ("hidden_size", "num_hidden_layers", "model_type"):
            ours, theirs = getattr(self, name), getattr(shape, name)
            if ours != theirs:
                raise ModelError(
                    f"{gates}: gates for another base: {name} is {ours} of {self.base_name}, and "
                    f"{theirs} of {base}"
                )

    def accepts(self, base_sha256: str) -> bool:
        """Whether the gates may read weights with this hash."""
        return base_sha256 == self.base_sha256 or base_sha256 in self.other_base_sha256

    def require_weights(self, base_sha256: str, base: str, gates: Path) -> None:
        """The same for the hash of a base's weights."""
        if not self.accepts(base_sha256):
            raise ModelError(
                f"{gates}: gates for another base: the SHA-256 of the weights is "
                f"{self.base_sha256} of {self.base_name}, and {base_sha256} of {base}"
            )


def write_gates_config(folder: Path, config: GatesConfig) -> None:
    """Writes `gates_config.json`, whole or not at all."""
    content = {item.name: getattr(config, item.name) for item in fields(config)}
    others = {"layers": list(config.layers), "other_base_sha256": dict(config.other_base_sha256)}
    write_json(folder / GATES_CONFIG_NAME, content | others)


def read_gates_config(folder: Path) -> GatesConfig:
    """Raises ModelError, with file, key, rule and value, for a file that is missing or wrong, and
    for gates.safetensors that is missing or another than the one it was written with."""
    file = folder / GATES_CONFIG_NAME
    if not file.is_file():
        raise ModelError(f"{folder}: not a selector folder: it has no {GATES_CONFIG_NAME}")
    content = read_json_object(file)
    try:
        config = _from_json(content)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    weights = folder / GATES_NAME
    if not weights.is_file():
        raise ModelError(f"{folder}: not a selector folder: it has no {GATES_NAME}")
    if config.gates_sha256 != (found := file_sha256(weights)):
        raise ModelError(
            f"{weights}: not the gates of {GATES_CONFIG_NAME}: its SHA-256 is {found}, and "
            f"gates_sha256 is {config.gates_sha256}"
        )
    return config


def gates_folder(path: str | Path) -> Path | None:
    """The selector folder of a path that names it or its gates.safetensors; None for others."""
    path = Path(path)
    folder = path.parent if path.name == GATES_NAME else path
    return folder if (folder / GATES_CONFIG_NAME).is_file() else None


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _from_json(content: Mapping[str, Any]) -> GatesConfig:
    known = fields(GatesConfig)
    for unknown in sorted(content.keys() - {item.name for item in known}):
        raise ModelError(f"has the unknown key {unknown!r}")
    for item in known:
        has_default = not (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if item.name not in content and not has_default:
            raise ModelError(f"lacks the key {item.name!r}")
    layers = content["layers"]
    _require(isinstance(layers, list), "layers", "a list", layers)
    return GatesConfig(**{**content, "layers": tuple(layers)})


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ModelError(f"{key!r} must be {rule}, got {value!r}")
