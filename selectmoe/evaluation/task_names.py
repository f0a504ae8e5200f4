"""Whether lm-eval knows the tasks that are asked for, in a second where it does.

Its own index of 14,000 task files takes many seconds to build. So it is built only for a name that
stands nowhere in the files; a few good names do not, and the index has the last word.
"""

import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from selectmoe.evaluation.local_tasks import PlannedTask, ships_with_the_package, task_files


def require_known(planned: Sequence[PlannedTask], tasks_dir: str | None) -> None:
    """Raises ConfigError for a name that lm-eval does not know; where it is not installed, as on
    the driver of a cluster, that is left to the worker."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return
    own = task_files(Path(tasks_dir)) if tasks_dir is not None else {}
    asked = {task.name for task in planned if not ships_with_the_package(task)} - own.keys()
    if names_nowhere(asked, Path(spec.origin).parent / "tasks"):
        from selectmoe.evaluation.lm_eval_run import require_in_index

        require_in_index(planned, tasks_dir)


def names_nowhere(names: Collection[str], folder: Path) -> set[str]:
    """Those of the names that are no word of any YAML file in the folder."""
    words = {name: re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])") for name in names}
    for file in folder.rglob("*yaml"):  # templates are called _something_yaml
        if not words:
            break
        text = file.read_text(encoding="utf-8", errors="replace")
        # Most files lack most names, and `in` says so a hundred times as fast as the expression.
        words = {
            name: word for name, word in words.items() if name not in text or not word.search(text)
        }
    return set(words)
