"""The files below a folder of a corpus, and what of it is not read: other files, runs of ours."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from selectmoe.data.endings import find_ending

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 20
# What `datasets` writes beside its tables: no rows.
_METADATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
# Settings that only the config.json of a run of ours has, by stage; "model_type": a model's.
_MARKS = ("selection_percentage", "training.quality_loss_type", "dataset.data_path", "num_fewshot")
_MODEL_MARK = "model_type"


@dataclass(slots=True)
class FolderContents:
    """Paths below a folder, or of several folders together."""

    files: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)  # files of no format that is read
    outputs: list[str] = field(default_factory=list)  # folders of runs and models
    linked: list[str] = field(default_factory=list)  # folders that were reached before

    def add(self, other: "FolderContents") -> None:
        self.files += other.files
        self.left_over += other.left_over
        self.outputs += other.outputs
        self.linked += other.linked


def list_folder(filesystem: pafs.FileSystem, folder: str) -> FolderContents:
    """Everything below a folder; its files are not in order yet.

    As in Spark and Ray, files and folders whose names begin with . or _ are skipped; those with the
    ending of a corpus are left over. Raises what the file system raises.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return _list_local(folder)
    return _list_store(filesystem, folder)


def is_output(settings: Any) -> bool:  # noqa: ANN401 (what JSON holds)
    """True for the config.json of a run of ours or of a model."""
    return isinstance(settings, dict) and any(mark in settings for mark in (*_MARKS, _MODEL_MARK))


def is_output_file(path: str) -> bool:
    """True for a config.json as `is_output` knows it."""
    try:
        with open(path, "rb") as file:
            return _is_output_text(file.read(MAX_CONFIG_BYTES))
    except OSError:
        return False


def is_regular(path: str) -> bool:
    """False for a named pipe, a device or a socket; a link that leads nowhere is left to fail."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def is_hidden(name: str) -> bool:
    return name[:1] in (".", "_")


def _list_local(top: str) -> FolderContents:
    """As Arrow lists it, but Arrow hides dead links and follows a loop 40 times."""

    def fail(error: OSError) -> None:
        raise error

    found = FolderContents()
    visited = {os.path.realpath(top)}
    for parent, folders, names in os.walk(top, onerror=fail, followlinks=True):
        if parent != top and CONFIG_NAME in names and is_output_file(f"{parent}/{CONFIG_NAME}"):
            found.outputs.append(parent)
            folders[:] = []
            continue
        is_inside_hidden = _has_hidden_part(parent, top)
        for name in names:
            path = os.path.join(parent, name)
            _sort_file(found, path, is_hidden=is_inside_hidden or is_hidden(name))
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = []
        for name, real in inner.items():
            if real not in visited:
                folders.append(name)
            elif not is_hidden(name):
                found.linked.append(os.path.join(parent, name))
            visited.add(real)
    return found


def _list_store(filesystem: pafs.FileSystem, top: str) -> FolderContents:
    infos = filesystem.get_file_info(pafs.FileSelector(top, recursive=True))
    paths = [info.path for info in infos if info.type == pafs.FileType.File]
    found = FolderContents()
    configs = (path for path in paths if path.endswith(f"/{CONFIG_NAME}"))
    found.outputs = sorted(_output_folders(filesystem, configs, top))
    for path in paths:
        if not any(path.startswith(f"{folder}/") for folder in found.outputs):
            _sort_file(found, path, is_hidden=_has_hidden_part(path, top))
    return found


def _output_folders(filesystem: pafs.FileSystem, configs: Iterable[str], top: str) -> Iterator[str]:
    for path in configs:
        folder = path.removesuffix(f"/{CONFIG_NAME}")
        if folder != top.rstrip("/"):
            with filesystem.open_input_stream(path) as file:
                if _is_output_text(file.read(MAX_CONFIG_BYTES)):
                    yield folder


def _sort_file(found: FolderContents, path: str, *, is_hidden: bool) -> None:
    name = path.rpartition("/")[2]
    is_corpus = find_ending(name) is not None
    if is_hidden:
        if is_corpus:
            found.left_over.append(path)
    elif is_corpus and name not in _METADATA and is_regular(path):
        found.files.append(path)
    else:
        found.left_over.append(path)


def _has_hidden_part(path: str, top: str) -> bool:
    return any(map(is_hidden, Path(path).relative_to(top).parts))


def _is_output_text(content: bytes) -> bool:
    try:
        return is_output(json.loads(content))
    except (ValueError, RecursionError):
        return False
