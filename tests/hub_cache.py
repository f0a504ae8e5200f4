"""The cache of the hub's client on this machine, as if a model had been downloaded."""

import shutil
from pathlib import Path


def add_to_hub_cache(cache: Path, name: str, folder: Path, *, commit: str = "c" * 40) -> Path:
    """A snapshot of the model NAME with the files of a folder, which its branch main names."""
    repository = cache / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot
