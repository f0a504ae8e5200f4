"""Inspects model folders without loading torch: their type, weight files and hashes."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from selectmoe.errors import ModelError, first_line
from selectmoe.model.hub_access import hub_answers

GATE_WEIGHTS_NAME = "full_rank_weights.safetensors"
ORIGINAL_WEIGHTS_NAME = "full_rank_weights.pt"  # of the original implementation
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"  # peft's
ADAPTER_FOLDER_NAME = "adapter"  # in a run of stage 1 with peft_mode=lora
GGUF_SUFFIX = ".gguf"
HASH_CHUNK_BYTES = 1 << 22
# The files of a model and its tokenizer; a hub repository may hold far more.
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")

logger = logging.getLogger(__name__)


def read_model_config(model: str) -> dict[str, object]:
    """config.json of a model folder or a hub name, as a dictionary; of a GGUF file what
    transformers makes of its metadata.

    Raises ModelError where there is none, or it cannot be downloaded.
    """
    name, revision = split_revision(model)
    folder = Path(name)
    if is_gguf(folder):
        from selectmoe.model.gguf_file import read_gguf_config  # which imports torch

        return read_gguf_config(folder)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"{model}: not a model folder: it has no config.json")
    elif is_hub_name(name):
        from huggingface_hub import hf_hub_download

        cached = cached_folder(model)
        if cached is not None and cached.name == revision and (cached / "config.json").is_file():
            return read_json_object(cached / "config.json")  # a commit never changes
        with _hub_errors(model) as answers:
            file = Path(
                hf_hub_download(
                    name, "config.json", revision=revision, local_files_only=not answers
                )
            )
    else:
        raise ModelError(f"model folder {model} does not exist")
    return read_json_object(file)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix."""
    return path.suffix == GGUF_SUFFIX and not path.is_dir()


def is_hub_name(name: str) -> bool:
    """True for OWNER/NAME, unless it is written as a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def read_json_object(file: Path) -> dict[str, object]:
    """Raises ModelError, naming the file, where it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def require_select_moe(model: str) -> None:
    """Raises ModelError, which names the remedy, unless `model` is a Select-MoE; one in a
    folder must embed all tokens of its tokenizer."""
    from selectmoe.model.vocabulary import require_stored_vocabulary

    settings = read_model_config(model)
    model_type = settings.get("model_type")
    if model_type == "olmoe":
        raise ModelError(
            f"{model}: an OLMoE without quality gates; convert it with "
            f"'python jobs/convert.py --base {model} --save-path DIR' and give DIR"
        )
    if model_type != "select_moe":
        raise ModelError(
            f"{model}: model_type must be 'select_moe', got {model_type!r}; convert an OLMoE with "
            "'python jobs/convert.py --base OLMOE --save-path DIR' and give DIR"
        )
    require_stored_vocabulary(Path(model), settings.get("vocab_size"))


def require_olmoe(model: str) -> None:
    """Raises ModelError, which names its type, unless `model` is an OLMoE without gates."""
    model_type = read_model_config(model).get("model_type")
    if model_type == "select_moe":
        raise ModelError(f"{model}: is a Select-MoE already: there is nothing to convert")
    if model_type != "olmoe":
        raise ModelError(f"{model}: only an OLMoE can be converted: model_type is {model_type!r}")


def split_revision(model: str) -> tuple[str, str | None]:
    """NAME@REVISION as its parts; a folder may have an @ in its name.

    Raises ModelError for a revision of a folder: only the hub has revisions.
    """
    name, _, revision = model.rpartition("@")
    if not name or Path(model).exists():
        return model, None
    if Path(name).is_dir():
        raise ModelError(f"{name}: revision={revision} needs the name of a model on the hub")
    return name, revision


def model_folder(model: str) -> Path:
    """The folder or GGUF file of a model; a hub name is downloaded into the hub's cache."""
    name, revision = split_revision(model)
    if Path(name).is_dir() or is_gguf(Path(name)):
        return Path(name)
    from huggingface_hub import snapshot_download

    cached = cached_folder(model)
    if cached is not None and cached.name == revision:
        return cached  # a commit never changes
    with _hub_errors(model) as answers:
        if answers:
            logger.info("%s: downloading from the hub what is not in the cache", model)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_HUB_PATTERNS),
                local_files_only=not answers,
            )
        )


def cached_folder(model: str) -> Path | None:
    """The folder of a model, or of the snapshot with weights that the hub's cache has of it."""
    name, revision = split_revision(model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or no name of the hub
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def pinned_model(model: str) -> str:
    """A folder as it is; a hub name as NAME@COMMIT of the snapshot that is downloaded here, so that
    workers elsewhere load the same files."""
    name, _ = split_revision(model)
    return model if Path(name).exists() else f"{name}@{model_folder(model).name}"


def weights_file(path: str | Path) -> Path:
    """Stage 1's weights file, of gates or of an adapter: `path` itself, or a file in it."""
    path = Path(path)
    names = (
        GATE_WEIGHTS_NAME,
        ORIGINAL_WEIGHTS_NAME,
        ADAPTER_WEIGHTS_NAME,
        f"{ADAPTER_FOLDER_NAME}/{ADAPTER_WEIGHTS_NAME}",
    )
    files = [path / name for name in names] if path.is_dir() else [path]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        raise ModelError(
            f"model_checkpoint_path must be a weights file or a folder with {GATE_WEIGHTS_NAME}, "
            f"or with stage 1's adapter, got {path}"
        )
    return weights


def calibration_folder(model: str, checkpoint: str | Path | None) -> Path:
    """The folder of these weights' calibration: that of stage 1's weights, else the model's."""
    return weights_file(checkpoint).parent if checkpoint else cached_folder(model) or Path(model)


def weights_size(model: str) -> int:
    """Bytes of the weight files of a model; 0 for one of the hub that was not downloaded."""
    folder = cached_folder(model)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def hash_weights(model: str, checkpoint: str | Path | None) -> str:
    """SHA-256 over the model's weight files and stage 1's, also of a hub model that is in the
    cache; of one that is not, over its name."""
    digest = hashlib.sha256()
    folder = cached_folder(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        digest.update(model.encode())
    for file in [*files, *([weights_file(checkpoint)] if checkpoint else [])]:
        with file.open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[bool]:
    """Yields whether the hub answers; turns every error of its client into a one-line ModelError.

    If it does not, the client must use its cache alone: it would retry for half a minute.
    """
    answers = hub_answers()
    try:
        yield answers
    except Exception as error:  # the client's HTTP library, and so its errors, change by version
        reason = first_line(error)
        if not answers and isinstance(error, FileNotFoundError):
            reason = "it is not in the cache, and the hub does not answer or HF_HUB_OFFLINE is set"
        raise ModelError(
            f"model {name}: no such folder, and it could not be downloaded from the hub: {reason}"
        ) from error
