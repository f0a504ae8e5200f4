"""Chooses the output folder of a run, and checks that a resumed run has the same settings."""

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selectmoe.config.loading import resolved
from selectmoe.config.run import RunConfig
from selectmoe.data.writers import write_json
from selectmoe.errors import ConfigError, ResumeError

OUTPUT_ROOT_VARIABLE = "SELECTMOE_OUTPUT_ROOT"
# Ray unpacks an uploaded --working-dir below this folder and deletes it after the job.
_UPLOAD_MARK = "working_dir_files"

logger = logging.getLogger(__name__)


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


def absolute_unless_url(path: str, key: str) -> str:
    return path if "://" in path else str(absolute_path(path, key))


def absolute_corpus(path: str, key: str) -> str:
    """The same for a corpus, which may be a hub name too."""
    return path if path.startswith("hub:") else absolute_unless_url(path, key)


def absolute_model(model: str, key: str) -> str:
    """The same for a model: what is no folder here is a hub name, or is refused as a model."""
    return str(absolute_path(model, key)) if Path(model).expanduser().is_dir() else model


def claim_run(
    config: RunConfig, *, free: Sequence[str], resume: bool, changeable: Sequence[str] = ()
) -> Path:
    """The run's folder, claimed by its settings.

    Those of `free` are not kept there. Those of `changeable` are, and hold for a resumed run that
    is given no others.
    """
    output = new_output_folder(config.stage, output=config.output, output_root=config.output_root)
    settings = {key: value for key, value in resolved(config).items() if key not in free}
    claim_output_folder(output, settings, resume=resume, changeable=changeable)
    logger.info("output: %s", output)
    return output


@contextlib.contextmanager
def telling_how_to_resume(output: Path) -> Iterator[None]:
    """Where Ctrl-C ends the block, a line with the option that resumes the run."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info("resume with --resume %s", output)
        raise


def claim_output_folder(
    folder: Path, settings: dict[str, object], *, resume: bool, changeable: Sequence[str] = ()
) -> None:
    """Writes `config.json` into a new folder, or checks that the folder's is the same run but for
    the settings named in `changeable`.

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
    fixed = {*saved, *settings}.difference(changeable)
    different = sorted(key for key in fixed if saved.get(key) != settings.get(key))
    if different:
        key = different[0]
        raise ResumeError(
            f"{folder}: holds a run with another configuration: {key} is {saved.get(key)!r} there "
            f"and {settings.get(key)!r} here"
        )
    if not resume:
        raise ResumeError(
            f"{folder}: output folder already holds this run; resume with --resume {folder}"
        )


def values_given(options: Mapping[str, object]) -> dict[str, object]:
    """The options that were given, by setting, over the settings of the run that `resume` names."""
    given = {key: value for key, value in options.items() if value is not None}
    if "resume" not in given:
        return given
    folder = absolute_path(str(given["resume"]), "resume")
    return {**saved_settings(folder), **given, "output": str(folder)}


def saved_settings(folder: Path) -> dict[str, object]:
    """The settings that the run in `folder` was started with."""
    file = folder / "config.json"
    if not file.is_file():
        raise ResumeError(f"{folder}: no run to resume: it has no config.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(saved, dict)
    return saved
