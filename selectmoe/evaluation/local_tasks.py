"""Resolves the names of tasks without importing lm-eval, and checks their files.

Files are checked row by row, so that a mistake is reported with its file and line before a model is
loaded.
A task is one of three kinds: the loss on the answers of conversations (`answer_loss.py`), a file of
multiple-choice questions, or the name of a lm-eval task, built in or from a YAML file.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
import yaml

from selectmoe.data.endings import find_ending, without_ending
from selectmoe.data.formats import read_objects
from selectmoe.data.messages import from_json
from selectmoe.data.readers import read_corpus
from selectmoe.data.row_errors import abridge
from selectmoe.errors import ConfigError, DataError
from selectmoe.evaluation.hellaswag import clean_row, is_hellaswag, with_choices
from selectmoe.records import RejectedRow, Sample

SHIPPED_TASKS = Path(__file__).parent / "tasks"
ANSWER_LOSS_FILES = {"demo_answer_loss": SHIPPED_TASKS / "held_out_conversations.jsonl"}

_NOT_TEXT = ("choices", "answer")
_CHECKED = (".jsonl", ".jsonl.gz")  # of the files that a task file names

Kind = Literal["answer_loss", "choices", "by_name"]


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One requested task."""

    name: str
    kind: Kind
    file: Path | None = None  # the rows; None for a task by name


def plan_tasks(names: Sequence[str], tasks_dir: str | None) -> list[PlannedTask]:
    """The tasks of `names`, with their files checked; names of lm-eval are looked up later.

    Raises ConfigError for a duplicate name or a missing file, and DataError for a file that is
    empty, has an unknown layout or a malformed row.
    """
    folders = [SHIPPED_TASKS, *([Path(tasks_dir)] if tasks_dir is not None else [])]
    files = {name: file for folder in folders for name, file in task_files(folder).items()}
    planned = [_plan(name, files) for name in names]
    for task in planned:
        same = [other for other in planned if other.name == task.name]
        if len(same) > 1:
            raise ConfigError(f"names of tasks must be unique, got {task.name!r} twice")
    return planned


def ships_with_the_package(task: PlannedTask) -> bool:
    """False if only lm-eval can tell whether the data of the task is on this machine."""
    return task.kind != "by_name" or task.name in task_files(SHIPPED_TASKS)


def require_known(planned: Sequence[PlannedTask], tasks_dir: str | None) -> None:
    """Raises ConfigError for a name that lm-eval does not know. Where lm-eval is not installed, as
    on the driver of a cluster, the worker checks instead.

    Building its index of 14,000 task files takes many seconds. So it is built only for a name that
    does not occur in the text of any file; lm-eval makes up a few names, for which it decides.
    """
    folder = lm_eval_task_files()
    if folder is None:
        return
    own = task_files(Path(tasks_dir)) if tasks_dir is not None else {}
    requested = {task.name for task in planned if not ships_with_the_package(task)} - own.keys()
    if absent_names(requested, folder):
        from selectmoe.evaluation.lm_eval_run import require_in_index

        require_in_index(planned, tasks_dir)


def lm_eval_task_files() -> Path | None:
    """The folder of lm-eval's own task files; None where it is not installed."""
    spec = find_spec("lm_eval")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "tasks"


def absent_names(names: Collection[str], folder: Path) -> set[str]:
    """The names that are not a word of any YAML file in the folder."""
    words = {name: re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])") for name in names}
    for file in folder.rglob("*yaml"):  # templates are named _something_yaml
        if not words:
            break
        text = file.read_text(encoding="utf-8", errors="replace")
        # Most files contain none of the names; `in` is a hundred times faster than the regex.
        words = {
            name: word for name, word in words.items() if name not in text or not word.search(text)
        }
    return set(words)


def is_row_file(name: str) -> bool:
    """True for a file of rows of any format that a corpus may have, by its name."""
    return find_ending(name) is not None


def _plan(name: str, files: Mapping[str, Path]) -> PlannedTask:
    if name in ANSWER_LOSS_FILES:
        return PlannedTask(name, "answer_loss", ANSWER_LOSS_FILES[name])
    if is_row_file(name):
        return _plan_file(Path(name))
    if name in files:
        for file in data_files(read_task_file(files[name]), files[name].parent):
            for _ in read_rows(file):
                pass  # each is checked as it is read
    return PlannedTask(name, "by_name")


def _plan_file(file: Path) -> PlannedTask:
    name = re.sub(r"\W+", "_", f"{file.parent.name}_{without_ending(file.name)}")
    if not file.is_file():
        raise ConfigError(f"tasks: file {file} does not exist")
    _, first = next(read_rows(file))
    if "choices" in with_choices(first):
        for location, row in read_rows(file):
            check_choices(location, with_choices(row))
        return PlannedTask(name, "choices", file)
    read_conversations(file)
    return PlannedTask(name, "answer_loss", file)


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its location, "FILE:ROW". Raises DataError for a malformed or no row."""
    number = 0
    ending = find_ending(str(file))
    is_text = ending is not None and ending.format in ("csv", "tsv")
    for number, row in read_objects(pafs.LocalFileSystem(), str(file)):
        yield f"{file}:{number}", _with_values(row) if is_text else row
    if not number:
        raise DataError(f"{file} contains no rows")


def _with_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table in text, which has lists and numbers as JSON."""
    return {
        key: from_json(cell) if key in _NOT_TEXT and isinstance(cell, str) else cell
        for key, cell in row.items()
    }


def write_for_lm_eval(file: Path, folder: Path) -> Path:
    """A copy of the rows, in the one form that lm-eval's reader takes as ours does: lines of
    JSON without a byte order mark."""
    copy = folder / f"{without_ending(file.name)}.jsonl"
    with copy.open("w", encoding="utf-8") as lines:
        for _, row in read_rows(file):
            lines.write(json.dumps(with_choices(row)) + "\n")
    return copy


def check_choices(location: str, row: dict[str, Any]) -> None:
    """Raises DataError unless the row is {"question" or "ctx", "choices", "answer"}."""
    question = row.get("question", row.get("ctx"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{location}: 'question' or 'ctx' must be text, got {abridge(question)}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(
            f"{location}: 'choices' must be a list of at least 2, got {abridge(choices)}"
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{location}: every choice must be text, got {abridge(choice)}")
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{location}: 'answer' must be the number of a choice, 0 to {len(choices) - 1}, got "
            f"{abridge(answer)}"
        )


def read_conversations(file: Path) -> list[Sample]:
    """The samples of a file. Raises DataError, with file and line, for a malformed row."""
    samples = []
    for row in read_corpus(str(file)):
        if isinstance(row, RejectedRow):
            raise DataError(f"{row.file}:{row.row}: {row.detail}")
        samples.append(row)
    return samples


def choices_config(task: PlannedTask) -> dict[str, Any]:
    """The lm-eval configuration of a file of multiple-choice questions.

    Its prompt is that of hellaswag if all rows have a 'ctx' to continue and an 'activity_label',
    the 'ctx' if all have one, that of mmlu (lettered choices) if all have a 'subject' and 4
    choices, and that of arc_easy otherwise.
    """
    assert task.file is not None
    rows = [with_choices(row) for _, row in read_rows(task.file)]
    process: dict[str, Any] = {}
    if all(map(is_hellaswag, rows)):
        template, process = "hellaswag", {"process_docs": _clean_rows}
    elif all("ctx" in row for row in rows):
        template = "continuation"
    elif all("subject" in row and len(row["choices"]) == 4 for row in rows):
        template = "letters"
    else:
        template = "question"
    config = read_task_file(SHIPPED_TASKS / "templates" / f"{template}.yaml")
    return {
        **config,
        **process,
        "task": task.name,
        "dataset_kwargs": {"data_files": {"test": str(task.file)}},
    }


def _clean_rows(dataset: Any) -> Any:  # noqa: ANN401 (a datasets.Dataset)
    return dataset.map(clean_row)


def task_files(folder: Path) -> dict[str, Path]:
    """The tasks, groups and tags that a folder of task files defines, with their files."""
    if not folder.is_dir():
        raise ConfigError(f"tasks_dir must be a folder of lm-eval task files, got {folder}")
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        config = read_task_file(file)
        tags = config.get("tag") or ()
        names = [
            config.get("task"),
            config.get("group"),
            *([tags] if isinstance(tags, str) else tags),
        ]
        files |= {name: file for name in names if isinstance(name, str)}
    return files


def read_task_file(file: Path) -> dict[str, Any]:
    """A task file as written: `!function` as text, and `include` not followed."""
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskFileLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a task file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a task file must be a mapping, got {abridge(config)}")
    return config


def with_absolute_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The task with data files resolved relative to `folder`: a worker runs in another one."""
    settings = dict(config.get("dataset_kwargs") or {})
    if "data_files" in settings:
        settings["data_files"] = _absolute(settings["data_files"], folder)
    return {**config, **({"dataset_kwargs": settings} if settings else {})}


def data_files(config: Mapping[str, Any], folder: Path) -> list[Path]:
    """The .jsonl files of a task. Raises ConfigError for a missing one."""
    files = _flat(
        (with_absolute_files(config, folder).get("dataset_kwargs") or {}).get("data_files")
    )
    rows = [Path(file) for file in files if file.endswith(_CHECKED) and "://" not in file]
    for file in rows:
        if not file.is_file() and not any(letter in str(file) for letter in "*?["):
            raise ConfigError(f"task {config.get('task')}: its data file {file} does not exist")
    return [file for file in rows if file.is_file()]


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""


def _absolute(files: Any, folder: Path) -> Any:  # noqa: ANN401 (a string, or lists and mappings of strings)
    if isinstance(files, str):
        return files if "://" in files else str(folder.absolute() / Path(files).expanduser())
    if isinstance(files, Mapping):
        return {split: _absolute(entry, folder) for split, entry in files.items()}
    return [_absolute(entry, folder) for entry in files]


def _flat(files: Any) -> list[str]:  # noqa: ANN401 (as above)
    if files is None or isinstance(files, str):
        return [files] if files else []
    entries = files.values() if isinstance(files, Mapping) else files
    return [file for entry in entries for file in _flat(entry)]


class _TaskFileLoader(yaml.SafeLoader):
    """Reads lm-eval's `!function module.name` as the string module.name."""


def _function_name(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return str(node.value)


_TaskFileLoader.add_constructor("!function", _function_name)
