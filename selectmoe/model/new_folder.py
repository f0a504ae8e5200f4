"""A new folder for a model: checked before the work begins, and complete or absent after it."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from selectmoe.errors import ConfigError
from selectmoe.model.weight_headers import weight_files


def new_folder(save_path: str | Path) -> Path:
    """`save_path` without links, checked to be new or empty."""
    target = Path(save_path).expanduser().resolve()
    reason = None
    try:
        if target.is_mount():
            reason = "which is a mount point: name a folder in it"
        elif target.is_dir() and any(target.iterdir()):
            reason = "which is not empty"
        elif target.exists() and not target.is_dir():
            reason = "which is a file"
    except OSError as error:
        reason = str(error)
    if reason:
        raise ConfigError(f"save_path must be a new or empty folder, got {target}, {reason}")
    return target


def require_space(target: Path, base: Path) -> None:
    """Raises ConfigError for a target inside the base, or on a disk that is too small for it."""
    base = base.resolve()
    if target == base or base in target.parents:
        raise ConfigError(f"save_path must lie outside base, {base}, got {target}")
    num_bytes = sum(file.stat().st_size for file in weight_files(base))
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ConfigError(
            f"save_path {target}: the checkpoint takes {num_bytes / 1e9:.1f} GB, "
            f"only {free / 1e9:.1f} GB are free"
        )


@contextlib.contextmanager
def whole_folder(target: Path, *, setting: str = "save_path") -> Iterator[Path]:
    """A folder to write to; it becomes `target` at the end and is deleted on an error.

    setting: the one that names the folder, for the message of a ConfigError.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{setting} {target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
