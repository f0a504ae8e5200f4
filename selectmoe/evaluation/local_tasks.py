"""Which tasks a run is asked for, found out without lm-eval: what is in files is checked first,
row by row, so that a mistake is known by its file and line before a model is loaded.

A task is one of three kinds: the loss on answers of conversations (`answer_loss.py`), a question
with choices in a file of rows, or a task that lm-eval knows by name, its own or a YAML file's.
"""

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from selectmoe.data.readers import read_corpus
from selectmoe.data.rows import shown
from selectmoe.errors import ConfigError, DataError
from selectmoe.records import RejectedRow, Sample

SHIPPED_TASKS = Path(__file__).parent / "tasks"
ANSWER_LOSS_FILES = {"demo_answer_loss": SHIPPED_TASKS / "held_out_conversations.jsonl"}
ROW_FILE_ENDINGS = (".jsonl", ".jsonl.gz")

Kind = Literal["answer_loss", "choices", "by_name"]


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task that was asked for."""

    name: str
    kind: Kind
    file: Path | None = None  # of its rows; a task by name has its own


def plan_tasks(names: Sequence[str], tasks_dir: str | None) -> list[PlannedTask]:
    """The tasks of `names`, their files checked; lm-eval's own names are looked up only later.

    Raises ConfigError for a name that is asked for twice or a file that is absent, and DataError
    for a file that is empty, of no known layout, or has a malformed row.
    """
    folders = [SHIPPED_TASKS, *([Path(tasks_dir)] if tasks_dir is not None else [])]
    files = {name: file for folder in folders for name, file in task_files(folder).items()}
    planned = [_plan(name, files) for name in names]
    for task in planned:
        same = [other for other in planned if other.name == task.name]
        if len(same) > 1:
            raise ConfigError(f"tasks must have names of their own, got {task.name!r} twice")
    return planned


def ships_with_the_package(task: PlannedTask) -> bool:
    """False for what only lm-eval can tell whether it is on this machine."""
    return task.kind != "by_name" or task.name in task_files(SHIPPED_TASKS)


def is_row_file(name: str) -> bool:
    return name.endswith(ROW_FILE_ENDINGS)


def _plan(name: str, files: Mapping[str, Path]) -> PlannedTask:
    if name in ANSWER_LOSS_FILES:
        return PlannedTask(name, "answer_loss", ANSWER_LOSS_FILES[name])
    if is_row_file(name):
        return _plan_file(Path(name))
    if name in files:
        for file in data_files(read_task_file(files[name]), files[name].parent):
            check_rows(file, lambda place, row: None)
    return PlannedTask(name, "by_name")


def _plan_file(file: Path) -> PlannedTask:
    name = re.sub(r"\W+", "_", f"{file.parent.name}_{file.name.removesuffix('.gz')[:-6]}")
    if not file.is_file():
        raise ConfigError(f"tasks: file {file} does not exist")
    _, first = next(read_rows(file))
    if "choices" in first:
        check_rows(file, check_choices)
        return PlannedTask(name, "choices", file)
    read_conversations(file)
    return PlannedTask(name, "answer_loss", file)


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its place, "FILE:LINE". Raises DataError for what is no row, or no row."""
    num_rows = 0
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: a row must be a JSON object, got {shown(row)}")
        num_rows += 1
        yield f"{file}:{number}", row
    if not num_rows:
        raise DataError(f"{file}: no rows: the file is empty")


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            for line in stream:
                yield line.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def check_rows(file: Path, check: Callable[[str, dict[str, Any]], None]) -> None:
    for place, row in read_rows(file):
        check(place, row)


def check_choices(place: str, row: dict[str, Any]) -> None:
    """Raises DataError unless the row is {"question" or "ctx", "choices", "answer"}."""
    question = row.get("question", row.get("ctx"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: 'question' or 'ctx' must be text, got {shown(question)}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{place}: 'choices' must be a list of at least 2, got {shown(choices)}")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{place}: every choice must be text, got {shown(choice)}")
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{place}: 'answer' must be the number of a choice, 0 to {len(choices) - 1}, got "
            f"{shown(answer)}"
        )


def read_conversations(file: Path) -> list[Sample]:
    """The samples of a file. Raises DataError, with file and line, for a row that is none."""
    samples = []
    for row in read_corpus(str(file)):
        if isinstance(row, RejectedRow):
            raise DataError(f"{row.file}:{row.row}: {row.detail}")
        samples.append(row)
    return samples


def choices_config(task: PlannedTask) -> dict[str, Any]:
    """The lm-eval task over a file of questions with choices.

    Its prompt is arc_easy's where rows have a 'question', hellaswag's where they have a 'ctx' to be
    continued, and mmlu's with lettered choices where all have a 'subject' and 4 choices.
    """
    assert task.file is not None
    rows = [row for _, row in read_rows(task.file)]
    if all("ctx" in row for row in rows):
        template = "continuation"
    elif all("subject" in row and len(row["choices"]) == 4 for row in rows):
        template = "letters"
    else:
        template = "question"
    config = read_task_file(SHIPPED_TASKS / "templates" / f"{template}.yaml")
    return {
        **config,
        "task": task.name,
        "dataset_kwargs": {"data_files": {"test": str(task.file)}},
    }


def task_files(folder: Path) -> dict[str, Path]:
    """The names that a folder of task files defines: tasks, groups and tags, with their files."""
    if not folder.is_dir():
        raise ConfigError(f"tasks_dir must be a folder of lm-eval task files, got {folder}")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        config = read_task_file(file)
        tags = config.get("tag") or ()
        names = [
            config.get("task"),
            config.get("group"),
            *([tags] if isinstance(tags, str) else tags),
        ]
        found |= {name: file for name in names if isinstance(name, str)}
    return found


def read_task_file(file: Path) -> dict[str, Any]:
    """A task file as it stands: functions only as names, nothing included."""
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskFileLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a task file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a task file must be a mapping, got {shown(config)}")
    return config


def with_absolute_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The task with its data files found from `folder`: a worker's own folder is another."""
    settings = dict(config.get("dataset_kwargs") or {})
    if "data_files" in settings:
        settings["data_files"] = _absolute(settings["data_files"], folder)
    return {**config, **({"dataset_kwargs": settings} if settings else {})}


def data_files(config: Mapping[str, Any], folder: Path) -> list[Path]:
    """The .jsonl files that a task names, each of which must be there."""
    files = _flat(
        (with_absolute_files(config, folder).get("dataset_kwargs") or {}).get("data_files")
    )
    rows = [Path(file) for file in files if is_row_file(file) and "://" not in file]
    for file in rows:
        if not file.is_file() and not any(letter in str(file) for letter in "*?["):
            raise ConfigError(f"task {config.get('task')}: its data file {file} does not exist")
    return [file for file in rows if file.is_file()]


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""


def _absolute(files: Any, folder: Path) -> Any:  # noqa: ANN401 (text, or lists and mappings of it)
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
    """Reads lm-eval's `!function module.name` as the text behind it."""


def _function_name(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return str(node.value)


_TaskFileLoader.add_constructor("!function", _function_name)
