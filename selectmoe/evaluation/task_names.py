"""Checks that lm-eval knows the requested tasks, in a second if it does.

Building its index of 14,000 task files takes many seconds. So it is built only for a name that does
not occur in the text of any file; lm-eval makes up a few names, for which the index decides.
"""

import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from selectmoe.evaluation.local_tasks import PlannedTask, ships_with_the_package, task_files


def require_known(planned: Sequence[PlannedTask], tasks_dir: str | None) -> None:
    """Raises ConfigError for a name that lm-eval does not know. Where lm-eval is not installed, as
    on the driver of a cluster, the worker checks instead."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return
    own = task_files(Path(tasks_dir)) if tasks_dir is not None else {}
    requested = {task.name for task in planned if not ships_with_the_package(task)} - own.keys()
    if absent_names(requested, Path(spec.origin).parent / "tasks"):
        from selectmoe.evaluation.lm_eval_run import require_in_index

        require_in_index(planned, tasks_dir)


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
