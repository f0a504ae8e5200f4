"""Chooses the output folder of a run, and checks that a resumed run has the same settings."""

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selectmoe.cli.run_lock import LOCK_NAME, locked
from selectmoe.config.loading import StageConfig, is_known_setting, resolved
from selectmoe.config.run import ResumableRunConfig, RunConfig
from selectmoe.data.writers import write_json
from selectmoe.errors import (
    ConfigError,
    ResumeError,
    SelectMoeError,
    StorageError,
    full_disk,
    list_names,
)

OUTPUT_ROOT_VARIABLE = "SELECTMOE_OUTPUT_ROOT"
CONFIG_NAME = "config.json"
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
    """The same for a model: what is no path here is a hub name, or is refused as a model."""
    return str(absolute_path(model, key)) if Path(model).expanduser().exists() else model


@contextlib.contextmanager
def claimed_run(
    config: RunConfig, *, free: Sequence[str], resume: bool, changeable: Sequence[str] = ()
) -> Iterator[Path]:
    """The run's folder, claimed by its settings and locked until the block ends.

    Settings in `free` are not kept there. Those in `changeable` are, and hold for a resumed run
    that is given no others. A run that can be resumed says how, where Ctrl-C or a full disk ends
    the block.
    """
    output = new_output_folder(config.stage, output=config.output, output_root=config.output_root)
    settings = {key: value for key, value in resolved(config).items() if key not in free}
    with locked(output):
        claim_output_folder(output, settings, resume=resume, changeable=changeable)
        logger.info("output: %s", output)
        resumable = isinstance(config, ResumableRunConfig)
        with telling_how_to_resume(output) if resumable else contextlib.nullcontext():
            yield output


@contextlib.contextmanager
def telling_how_to_resume(output: Path) -> Iterator[None]:
    """Adds the option that resumes the run where Ctrl-C or a full disk ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info("resume with --resume %s", output)
        raise
    except Exception as error:
        full = None if isinstance(error, StorageError) else full_disk(error)
        if full is None:
            raise
        # Ours names the disk already, which may be another one, such as that of a worker.
        ours = isinstance(error, SelectMoeError)
        problem = str(error) if ours else f"{full.filename or output}: {full.strerror}"
        raise StorageError(
            f"{problem}; free some space, then resume with --resume {output}"
        ) from error


def claim_output_folder(
    folder: Path, settings: dict[str, object], *, resume: bool, changeable: Sequence[str] = ()
) -> None:
    """Writes `config.json` into a new folder, or checks that the folder's is the same run but for
    the settings named in `changeable`, whose new values are kept.

    Raises ResumeError where the folder belongs to another run, or to this one without `resume`.
    """
    file = folder / CONFIG_NAME
    if not folder.exists() or all(entry.name == LOCK_NAME for entry in folder.iterdir()):
        if resume:
            raise ResumeError(f"{folder}: nothing to resume: the folder is empty or absent")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    if not file.is_file():
        raise ResumeError(f"{folder}: output folder is not empty and has no config.json of a run")
    saved = read_settings(file)
    if not saved.keys() & settings.keys():
        raise ResumeError(f"{folder}: output folder is not empty, and its config.json is of no run")
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
    if saved != settings:
        write_json(file, settings)


def values_given(
    options: Mapping[str, object], config_class: type[StageConfig]
) -> dict[str, object]:
    """The options that were given, by setting, over the settings of the run that `resume` names.

    Raises ResumeError where that folder holds no run of this stage.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if "resume" not in given:
        return given
    folder = absolute_path(str(given["resume"]), "resume")
    saved = saved_settings(folder)
    unknown = [key for key in saved if not is_known_setting(config_class, key)]
    if unknown:
        raise ResumeError(
            f"{folder}: no run of {config_class.stage} to resume: its config.json has "
            f"{list_names(unknown, most=2)}, which this stage does not have"
        )
    return {**saved, **given, "output": str(folder)}


def saved_settings(folder: Path) -> dict[str, object]:
    """The settings that the run in `folder` was started with."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ResumeError(f"{folder}: no run to resume: it has no config.json")
    return read_settings(file)


def read_settings(file: Path) -> dict[str, object]:
    """Raises ResumeError where the file is not a JSON object, as after a copy that was cut off."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = "it is empty" if not file.stat().st_size else f"not valid JSON: {error}"
        raise ResumeError(f"{file}: not the settings of a run: {reason}") from error
    if not isinstance(saved, dict):
        raise ResumeError(
            f"{file}: not the settings of a run: must hold a JSON object, got "
            f"{type(saved).__name__}"
        )
    return saved


def finished_run(path: str, key: str) -> Path:
    """The folder of a finished run, given it or its `scored`."""
    folder = absolute_path(path, key)
    is_inside = folder.name == "scored" and not (folder / "manifest.json").is_file()
    run = folder.parent if is_inside else folder
    if not (run / "manifest.json").is_file():
        raise ConfigError(f"--scored must be the folder of a finished run, got {folder}")
    return run
