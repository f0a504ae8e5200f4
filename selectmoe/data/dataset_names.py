"""The names of files and datasets: their paths below what was given.

    --data corpus            corpus/gsm/train.jsonl                gsm/train
    --data gsm math          gsm/train.jsonl, math/train.jsonl     gsm/train, math/train
    --data dolly.jsonl                                             dolly
    --data corpus            corpus/train-00000-of-00002.parquet   train

Where two datasets would have one name, the names of all files below the folders that were given
begin one folder higher.
"""

import re
from collections.abc import Sequence

from selectmoe.data.endings import without_ending

# train-00000-of-00002, and the hash that older versions of `datasets` put after it.
_SHARD = re.compile(r"(^|[-_.])\d{3,}-of-\d{3,}(-[0-9a-f]{16})?$")


def name_files(files: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """For each (path, folder that was given), the name of the file and that of its dataset."""
    datasets = [_dataset(path) for path, _ in files]
    levels = {root: 0 for _, root in files}
    while True:
        names = [
            _below(dataset, root, levels[root])
            for dataset, (_, root) in zip(datasets, files, strict=True)
        ]
        by_name: dict[str, set[str]] = {}
        for name, dataset in zip(names, datasets, strict=True):
            by_name.setdefault(name, set()).add(dataset)
        raised = {
            root
            for name, (_, root) in zip(names, files, strict=True)
            if (len(by_name[name]) > 1 or not name) and levels[root] < root.count("/")
        }
        if not raised:
            break
        for root in raised:
            levels[root] += 1
    return [
        (_below(path, root, levels[root]), name)
        for (path, root), name in zip(files, names, strict=True)
    ]


def _dataset(path: str) -> str:
    """The path without ending and number of shard: the same for all files of one dataset."""
    folder, slash, name = path.rpartition("/")
    stem = _SHARD.sub("", without_ending(name))
    return f"{folder}{slash}{stem}" if stem else folder


def _below(path: str, root: str, level: int) -> str:
    """The path below the folder `level` steps above `root`."""
    base = root.rstrip("/").rsplit("/", level)[0] if level else root.rstrip("/")
    return path[len(base) :].lstrip("/")
