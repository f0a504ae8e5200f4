"""Where a run writes, and what a folder that already holds one is good for."""

import datetime
import json
import os
from pathlib import Path

from selectmoe.data.writers import write_json
from selectmoe.errors import ConfigError, ResumeError

OUTPUT_ROOT_VARIABLE = "SELECTMOE_OUTPUT_ROOT"
# Ray unpacks an uploaded --working-dir below this folder and deletes it after the job.
_UPLOAD_MARK = "working_dir_files"


def in_uploaded_folder() -> bool:
    """True in a job whose working directory is a temporary copy made by `--working-dir`."""
    return _UPLOAD_MARK in Path.cwd().parts


def new_output_folder(stage: str, *, output: str | None, output_root: str | None) -> Path:
    """`output`, or `<root>/<stage>/<YYYY-MM-DD>/<HH-MM-SS>`; not created yet.

    The root is the setting, else the environment's SELECTMOE_OUTPUT_ROOT, else `outputs`; in an
    uploaded working directory, which does not last, it is `selectmoe_outputs` in the home folder.
    """
    if output is not None:
        return absolute_path(output, "output")
    root = output_root or os.environ.get(OUTPUT_ROOT_VARIABLE)
    if root is not None:
        base = absolute_path(root, "output_root")
    elif in_uploaded_folder():
        base = Path.home() / "selectmoe_outputs"
    else:
        base = Path.cwd() / "outputs"
    now = datetime.datetime.now()
    return base / stage / now.strftime("%Y-%m-%d") / now.strftime("%H-%M-%S")


def absolute_path(path: str, key: str) -> Path:
    """`path` made absolute; workers may run in another directory than the driver.

    Raises ConfigError for a relative path in an uploaded working directory, where it would mean a
    temporary copy.
    """
    expanded = Path(path).expanduser()
    if not expanded.is_absolute() and in_uploaded_folder():
        raise ConfigError(
            f"{key} must be an absolute path or a URL under --working-dir, because the job runs in "
            f"a temporary copy of the folder, got {path!r}"
        )
    return Path(os.path.abspath(expanded))


def claim_output_folder(folder: Path, settings: dict[str, object], *, resume: bool) -> None:
    """Writes `config.json` into a new folder, or checks that the folder's is the same run.

    Raises ResumeError where the folder belongs to another run, or to this one without `resume`.
    """
    file = folder / "config.json"
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise ResumeError(f"{folder}: nothing to resume: the folder is empty or absent")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    if not file.is_file():
        raise ResumeError(f"{folder}: output folder is not empty and has no config.json of a run")
    saved = json.loads(file.read_text(encoding="utf-8"))
    different = sorted(key for key in {*saved, *settings} if saved.get(key) != settings.get(key))
    if different:
        key = different[0]
        raise ResumeError(
            f"{folder}: holds a run with another configuration: {key} is {saved.get(key)!r} there "
            f"and {settings.get(key)!r} here"
        )
    if not resume:
        raise ResumeError(
            f"{folder}: output folder already holds this run; go on with --resume {folder}"
        )


def saved_settings(folder: Path) -> dict[str, object]:
    """The settings that the run in `folder` was started with."""
    file = folder / "config.json"
    if not file.is_file():
        raise ResumeError(f"{folder}: no run to resume: it has no config.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(saved, dict)
    return saved
