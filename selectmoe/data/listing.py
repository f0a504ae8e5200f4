"""The files of several corpora, each once and named; and what of their folders is not read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from selectmoe.data.dataset_names import name_files
from selectmoe.data.formats import FileSlice
from selectmoe.data.hub import is_hub, parse_hub
from selectmoe.data.sources import find_files, locate

MAX_NAMES_IN_A_LINE = 6
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_NAMES_IN_A_MANIFEST = 100


@dataclass(frozen=True, slots=True)
class Corpus:
    """One corpus, whole: as a user names it, and what is read of it."""

    spec: str
    filesystem: pafs.FileSystem | None  # None: a dataset of the hub
    files: tuple[FileSlice, ...]  # of the hub: one, whose path is the spec


@dataclass(frozen=True, slots=True)
class PassedOver:
    """What lies in the folders of corpora and is not read."""

    left_over: tuple[str, ...] = ()  # files of no readable format, and hidden ones
    outputs: tuple[str, ...] = ()  # folders of runs and models
    repeated: tuple[str, ...] = ()  # files and folders that were reached before

    def lines(self) -> list[str]:
        """What a person is told, a line for each kind."""
        kinds = (
            (self.left_over, "file is not read, by its name", "files are not read, by their names"),
            (
                self.outputs,
                "folder of a run or model is not read",
                "folders of runs or models are not read",
            ),
            (self.repeated, "path is reached twice and read once", "paths are reached twice and "
             "read once"),
        )  # fmt: skip
        return [
            f"{len(paths):,} {one if len(paths) == 1 else many}: {_shortened(paths)}"
            for paths, one, many in kinds
            if paths
        ]


@dataclass(frozen=True, slots=True)
class Listing:
    """All corpora of a run, in their order."""

    corpora: tuple[Corpus, ...]
    passed_over: PassedOver

    @property
    def num_files(self) -> int:
        return sum(len(corpus.files) for corpus in self.corpora)

    @property
    def folders(self) -> list[str]:
        """Where the names of files begin: folder + name is a path. The shortest come first."""
        files = [file for corpus in self.corpora for file in corpus.files]
        folders = {file.path.removesuffix(file.name) for file in files if file.name}
        return sorted(folders, key=lambda folder: (len(folder), folder))


@dataclass(slots=True)
class _Found:
    """What is gathered while corpora are listed."""

    known: set[object] = field(default_factory=set)
    left_over: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)

    def is_new(self, path: str, identity: object) -> bool:
        if identity in self.known:
            self.repeated.append(path)
            return False
        self.known.add(identity)
        return True


def list_corpora(specs: Sequence[str]) -> Listing:
    """Raises DataError for a corpus without a file that is read; opens no file of rows."""
    found = _Found()
    listed: list[tuple[str, pafs.FileSystem | None, str, list[str]]] = []
    for spec in specs:
        if is_hub(spec):
            dataset = parse_hub(spec)
            paths = [dataset.path] if found.is_new(spec, dataset) else []
            listed.append((spec, None, os.path.dirname(dataset.name), paths))
            continue
        filesystem, path = locate(spec)
        files = find_files(filesystem, path, spec)
        found.left_over += files.contents.left_over
        found.outputs += files.contents.outputs
        found.repeated += files.contents.linked
        new = [file for file in files.files if found.is_new(file, _identity(filesystem, file))]
        listed.append((spec, filesystem, files.root, new))
    passed_over = PassedOver(
        tuple(dict.fromkeys(found.left_over)),
        tuple(dict.fromkeys(found.outputs)),
        tuple(dict.fromkeys(found.repeated)),
    )
    return Listing(_named(listed), passed_over)


def _named(
    listed: Sequence[tuple[str, pafs.FileSystem | None, str, list[str]]],
) -> tuple[Corpus, ...]:
    names = iter(name_files([(path, root) for _, _, root, paths in listed for path in paths]))
    corpora = []
    for spec, filesystem, _, paths in listed:
        slices = []
        for path in paths:
            name, dataset = next(names)
            if filesystem is None:
                slices.append(
                    FileSlice(spec, name=f"{dataset}{parse_hub(spec).suffix}", dataset=dataset)
                )
            else:
                slices.append(FileSlice(path, name=name, dataset=dataset))
        corpora.append(Corpus(spec, filesystem, tuple(slices)))
    return tuple(corpora)


def _identity(filesystem: pafs.FileSystem, path: str) -> object:
    """Equal for two paths to one file: links, hard links, snapshots of the hub's cache."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.type_name, path
    try:
        status = os.stat(path)
    except OSError:  # a dead link: its reader says so
        return path
    return status.st_dev, status.st_ino


def _shortened(paths: Sequence[str]) -> str:
    """The first names, relative to the folder that all have in common."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    names = [path[len(common) :].lstrip("/") for path in paths[:MAX_NAMES_IN_A_LINE]]
    # A name may have a line feed, and this is one line.
    names = [_CONTROL.sub(lambda found: repr(found[0])[1:-1], name) for name in names]
    more = len(paths) - len(names)
    listed = ", ".join(names) + (f" and {more:,} more" if more else "")
    return f"{listed} (in {common})" if common else listed
