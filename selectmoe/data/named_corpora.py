"""The corpora that `dataset.names` may name, and where each is loaded from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from selectmoe.data.endings import READABLE, find_ending, without_ending
from selectmoe.errors import ConfigError, DataError

# The pool of LESS (Xia et al. 2024), in the layout of open-instruct, is one archive on the hub.
_LESS = (
    "zip://data/train/processed/{0}/{0}_data.jsonl"
    "::hf://datasets/princeton-nlp/less_data/less-data.zip"
)
KNOWN_CORPORA = {
    "cot": _LESS.format("cot"),
    "dolly": "hub:databricks/databricks-dolly-15k",
    "flan_v2": _LESS.format("flan_v2"),
    "oasst1": _LESS.format("oasst1"),
}


class CorpusSettings(Protocol):
    """The settings of a stage that say which corpora it reads."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def folder(self) -> str | None: ...


def corpus_specs(dataset: CorpusSettings) -> tuple[str, ...]:
    """The corpora that the settings name, as specs of `read_corpora`; () means the demo corpus.

    Raises ConfigError for a name that is not known, and DataError for one that is not in the
    folder.
    """
    return (*dataset.paths, *(_find(name, dataset.folder) for name in dataset.names))


def _find(name: str, folder: str | None) -> str:
    if folder is not None:
        return _find_in_folder(name, Path(folder))
    if name not in KNOWN_CORPORA:
        known = ", ".join(KNOWN_CORPORA)
        raise ConfigError(
            f"dataset.names must be among {known} unless dataset.folder is set, got {name!r}"
        )
    return KNOWN_CORPORA[name]


def _find_in_folder(name: str, folder: Path) -> str:
    if (folder / name).exists():
        return str(folder / name)
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [file for file in files if find_ending(file) and without_ending(file) == name]
    if len(found) == 1:
        return str(folder / found[0])
    contents = ", ".join(files[:8]) or "nothing"
    raise DataError(
        f"dataset.names: {name!r} must be a folder or one file in {folder}, with an ending of "
        f"{READABLE}; {_got(found) or f'the folder contains {contents}'}"
    )


def _got(files: Sequence[str]) -> str:
    return f"got {' and '.join(files)}" if files else ""
