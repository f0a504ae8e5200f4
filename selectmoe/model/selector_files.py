"""Finds the files of a selector, of either kind, without torch.

    --model                     model_checkpoint_path      what scores
    Select-MoE checkpoint       none, or stage 1's         the gates inside it
    selector folder             none                       its gates, on the base that they name
    base                        selector folder            these gates, on this base
    base                        none                       gates that ship with the package for it

A base is a model folder, a hub name or a GGUF file. Where the base of a selector folder is under
another path on this machine, the third line says so.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selectmoe.errors import ModelError
from selectmoe.model.base_weights import hash_base
from selectmoe.model.checkpoint import (
    calibration_folder,
    hash_weights,
    is_gguf,
    is_hub_name,
    model_folder,
    read_model_config,
    require_select_moe,
    split_revision,
    weights_file,
    weights_size,
)
from selectmoe.model.gates_config import (
    GATES_CONFIG_NAME,
    GATES_NAME,
    BaseShape,
    GatesConfig,
    file_sha256,
    gates_folder,
    read_gates_config,
)
from selectmoe.model.vocabulary import require_stored_vocabulary
from selectmoe.model.weight_checks import count_parameters, require_weights
from selectmoe.paths import SHIPPED_GATES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelectMoeFiles:
    """A Select-MoE checkpoint, whose gates are inside it."""

    model: str
    """Folder or hub name."""
    checkpoint: Path | None
    """Stage 1's weights file."""

    def require_readable(self) -> None:
        """Raises ModelError where a file is missing, cut off or of another model."""
        require_select_moe(self.model)
        require_weights(self.model, self.checkpoint)

    def model_path(self) -> Path:
        """The folder of the model and its tokenizer, downloaded if it is on the hub."""
        return model_folder(self.model)

    def facts(self) -> dict[str, object]:
        """What a description of the selector adds to the model's config.json."""
        return {}

    def weights_hash(self) -> str:
        """SHA-256 of the weights, as in manifests and calibrations."""
        return hash_weights(self.model, self.checkpoint)

    def calibrated_hashes(self) -> tuple[str, ...]:
        """Other values of `weights_hash` whose calibrations apply."""
        return ()

    def calibration_folder(self) -> Path:
        """Where the calibration of these weights is, or would be."""
        return calibration_folder(self.model, self.checkpoint)

    def num_parameters(self) -> int:
        """Without the language-model head."""
        return count_parameters(self.model, with_head=False)

    def num_bytes(self) -> int:
        """Bytes of the weight files; 0 for a hub model that was not downloaded."""
        return weights_size(self.model)


@dataclass(frozen=True, slots=True)
class GatedBaseFiles:
    """A base, and the selector folder of its gates."""

    model: str
    """The base: folder, hub name or GGUF file."""
    gates: Path
    config: GatesConfig
    any_form: bool = False
    """True where the gates ship for the base of this hub name, in whichever form it is there."""

    def model_path(self) -> Path:
        """The base's folder or GGUF file; one of the hub is downloaded into the hub's cache."""
        try:
            return model_folder(self.model)
        except ModelError as error:
            raise ModelError(
                f"{error}; where the base is elsewhere on this machine, give it as "
                f"model=BASE model_checkpoint_path={self.gates}"
            ) from error

    def facts(self) -> dict[str, object]:
        layers = ", ".join(map(str, self.config.layers))
        return {"base": self.model, "gates": str(self.gates), "gated_layers": layers}

    def require_readable(self) -> None:
        """Raises ModelError where a file is missing or cut off, or the gates are for another base.
        A base of the hub is downloaded first."""
        path = self.model_path()
        settings = read_model_config(str(path))
        self.config.require_shape(BaseShape.from_settings(settings), self.model, self.gates)
        require_stored_vocabulary(path, settings.get("vocab_size"))
        found = hash_base(path)
        if not self.any_form:
            self.config.require_weights(found, self.model, self.gates)
        elif not self.config.accepts(found):
            _warn_of_another_form(self.model, found, self.config.base_sha256, self.gates)

    def weights_hash(self) -> str:
        """SHA-256 of the hashes of base and gates."""
        return _both(hash_base(self.model_path()), file_sha256(self.gates / GATES_NAME))

    def calibrated_hashes(self) -> tuple[str, ...]:
        """`weights_hash` of every form of the base that the gates accept: a calibration that was
        made on one of them applies to all."""
        gates = file_sha256(self.gates / GATES_NAME)
        bases = (self.config.base_sha256, *self.config.other_base_sha256)
        return tuple(_both(base, gates) for base in bases)

    def calibration_folder(self) -> Path:
        return self.gates

    def num_parameters(self) -> int:
        """Of the whole base, without its head."""
        path = self.model_path()
        if is_gguf(path):
            from selectmoe.model.gguf_file import count_gguf_parameters  # which imports torch

            return count_gguf_parameters(path)
        return count_parameters(str(path), with_head=False)

    def num_bytes(self) -> int:
        """Bytes of the base's weight files, of a GGUF file those of its weights in bfloat16; 0 for
        a hub model that was not downloaded."""
        if is_gguf(Path(self.model)):
            return 2 * self.num_parameters()
        return weights_size(self.model)


SelectorFiles = SelectMoeFiles | GatedBaseFiles


def find_selector(model: str, checkpoint: str | Path | None = None) -> SelectorFiles:
    """The files that `model` and `model_checkpoint_path` name.

    Raises ModelError where there is no such model, or a base that has no gates. Whether the files
    are whole and fit each other is `require_readable`'s to say.
    """
    name, _ = split_revision(model)
    own = gates_folder(name)
    if own is not None:
        return _selector_folder(own, checkpoint)
    given = None if checkpoint is None else gates_folder(checkpoint)
    if given is not None:
        return GatedBaseFiles(model, given, read_gates_config(given))
    try:
        settings = read_model_config(model)
    except ModelError:
        own = _hub_selector(model)
        if own is None:
            raise
        return _selector_folder(own, checkpoint)
    if settings.get("model_type") == "select_moe":
        return SelectMoeFiles(model, None if checkpoint is None else weights_file(checkpoint))
    if checkpoint is not None:
        raise ModelError(
            f"model_checkpoint_path must be a folder with {GATES_CONFIG_NAME} for gates on "
            f"{model}, which is no Select-MoE, got {checkpoint}"
        )
    return _shipped(model, settings)


def _selector_folder(folder: Path, checkpoint: str | Path | None) -> GatedBaseFiles:
    """The gates of a selector folder, on the base that they name."""
    if checkpoint is not None:
        raise ModelError(
            f"{folder}: has gates of its own; give model=BASE with model_checkpoint_path="
            f"{checkpoint}"
        )
    config = read_gates_config(folder)
    beside = folder / config.base
    if beside.exists():  # also an absolute path
        return GatedBaseFiles(str(beside.resolve()), folder, config)
    if is_hub_name(config.base):
        return GatedBaseFiles(config.base_name, folder, config)
    raise ModelError(
        f"{folder}: its base {config.base} is not on this machine; give it as model=BASE "
        f"model_checkpoint_path={folder}"
    )


def _hub_selector(model: str) -> Path | None:
    """The folder of a selector on the hub: a repository with gates and without a config.json."""
    name, _ = split_revision(model)
    if Path(name).exists() or not is_hub_name(name):
        return None
    try:
        return gates_folder(model_folder(model))
    except ModelError:
        return None


def _shipped(model: str, settings: Mapping[str, object]) -> GatedBaseFiles:
    """The gates that ship with the package for a base: by its hub name, or the hash of its weights.

    Raises ModelError, with the command that makes some, where none do.
    """
    shape = BaseShape.from_settings(settings)
    name, _ = split_revision(model)
    on_hub = not Path(name).exists()
    similar = ""
    for file in sorted(SHIPPED_GATES.glob(f"*/{GATES_CONFIG_NAME}")):
        config = read_gates_config(file.parent)
        if config.shape != shape:
            continue
        if on_hub and name.lower() == config.base.lower():
            return GatedBaseFiles(model, file.parent, config, any_form=True)
        found = hash_base(model_folder(model))
        if config.accepts(found):
            return GatedBaseFiles(model, file.parent, config)
        similar = (
            f"; those for {config.base} were made on weights with the SHA-256 "
            f"{config.base_sha256}, and these have {found}"
        )
    raise ModelError(_without_gates(model, settings.get("model_type"), similar))


def _without_gates(model: str, model_type: object, similar: str) -> str:
    warm_up = f"'python jobs/pretrain.py --model {model}'"
    if model_type == "olmoe":
        return (
            f"{model}: an OLMoE without quality gates{similar}; convert it with "
            f"'python jobs/convert.py --base {model} --save-path DIR' and give DIR, or warm up "
            f"gates on it with {warm_up} and give its output folder as model_checkpoint_path"
        )
    return (
        f"{model}: a base without quality gates (model_type {model_type!r}), and none ship for it"
        f"{similar}; warm them up with {warm_up} and give its output folder as "
        "model_checkpoint_path"
    )


@functools.cache  # once a process, however many engines are loaded
def _warn_of_another_form(base: str, found: str, made_on: str, gates: Path) -> None:
    logger.warning(
        "%s: its weights (SHA-256 %s…) are another form than the gates were made on (%s…), and "
        "scores may differ slightly; see %s",
        base,
        found[:12],
        made_on[:12],
        gates / "README.md",
    )


def _both(base_sha256: str, gates_sha256: str) -> str:
    return hashlib.sha256((base_sha256 + gates_sha256).encode()).hexdigest()
