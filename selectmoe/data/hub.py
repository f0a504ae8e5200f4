"""Datasets of the Hugging Face Hub: their names in settings, and their rows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selectmoe.config.columns import ColumnRules
from selectmoe.data.byte_streams import translate_errors
from selectmoe.data.formats import Rows, parse_object
from selectmoe.data.rows import RowLocation
from selectmoe.errors import DataError

HUB_PREFIX = "hub:"
HUB_FORM = "hub:NAME[:CONFIG][:SPLIT][@REVISION]"
_COLON = re.compile(r":(?![^\[]*\])")  # not that of train[:100]


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One split of a dataset."""

    name: str  # on the hub, or a folder that is laid out like one
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # a branch, tag or commit

    @property
    def path(self) -> str:
        """Its name and configuration, as a path."""
        return f"{self.name}/{self.config}" if self.config else self.name

    @property
    def suffix(self) -> str:
        """What its ids have after the name, for another split or revision than the default."""
        split = "" if self.split == "train" else f":{self.split}"
        return f"{split}@{self.revision}" if self.revision else split


def is_hub(spec: str) -> bool:
    return spec.startswith(HUB_PREFIX)


def parse_hub(spec: str) -> HubDataset:
    """hub:NAME, hub:NAME:SPLIT, hub:NAME:CONFIG:SPLIT, each with @REVISION at its end.

    NAME may be a local folder, whose path may have a colon or an @ itself. Raises DataError.
    """
    text = spec.removeprefix(HUB_PREFIX)
    name = _local_folder(text)
    rest = text[len(name) :]
    if not name:
        name = re.split("[:@]", text, maxsplit=1)[0]
        rest = text[len(name) :]
    selection, at, revision = rest.partition("@")
    parts = _COLON.split(selection)[1:] if selection else []
    if not name or len(parts) > 2 or not all(parts) or (at and not revision):
        raise DataError(f"{spec}: must be {HUB_FORM}")
    config = parts[0] if len(parts) == 2 else None
    return HubDataset(name, config, parts[-1] if parts else "train", revision or None)


def require_datasets(spec: str) -> None:
    if find_spec("datasets") is None:
        raise DataError(f"{spec}: needs the package `datasets`: pip install 'selectmoe[hub]'")


def read_hub(spec: str, *, dataset: str, name: str, max_row_bytes: int, rules: ColumnRules) -> Rows:
    """The rows of a split. dataset, name: of rows that have none, and of their ids."""
    wanted = parse_hub(spec)
    require_datasets(spec)
    rows = translate_errors(_rows(wanted), f"{spec}: could not be downloaded from the hub")
    number = 0
    for number, row in enumerate(rows, start=1):
        location = RowLocation(spec, number, dataset, name)
        yield parse_object(row, location, rules, limit=max_row_bytes)
    if not number:
        raise DataError(f"{spec}: no rows: the split is empty")


def _rows(wanted: HubDataset) -> Iterator[dict[str, Any]]:
    import datasets

    yield from datasets.load_dataset(
        wanted.name, wanted.config, split=wanted.split, revision=wanted.revision, streaming=True
    )


def _local_folder(text: str) -> str:
    """The longest beginning of a text, up to a colon, an @ or its end, that is a folder."""
    ends = [match.start() for match in re.finditer("[:@]", text)]
    candidates = [text, *(text[:end] for end in reversed(ends))]
    return next((name for name in candidates if name and Path(name).expanduser().is_dir()), "")
