"""Runs evaluation tasks on a model through lm-eval's Python API.

>>> for result in evaluate(config, device="cpu"):
...     print(result.task, result.metrics["acc"].value)
"""

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from selectmoe.config.evaluation import EvaluateConfig, fewshot_numbers
from selectmoe.data.message_fields import content_key
from selectmoe.data.rejected import describe
from selectmoe.errors import ConfigError, ModelError, first_line
from selectmoe.evaluation.lm_eval_model import split_model_args, wrap_model
from selectmoe.evaluation.local_tasks import (
    SHIPPED_TASKS,
    PlannedTask,
    absent_names,
    choices_config,
    lm_eval_task_files,
    nearest,
    plan_tasks,
    read_conversations,
    read_task_file,
    task_files,
    with_absolute_files,
    write_for_lm_eval,
)
from selectmoe.evaluation.quiet_lm_eval import quiet
from selectmoe.evaluation.replicas import Replica, Replicas
from selectmoe.evaluation.target_model import load_target
from selectmoe.evaluation.task_results import (
    MetricValue,
    SampleValues,
    TaskResult,
    aggregate,
    finite_numbers,
    top_level,
)
from selectmoe.records import Sample

# For the few metrics whose standard error is bootstrapped; lm-eval's 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1_000


def evaluate(
    config: EvaluateConfig, *, device: str, others: Sequence[Replica] = ()
) -> Iterator[TaskResult]:
    """Yields one result per task when it is done, and one per task of a group.

    others: replicas of the model in other processes, which answer a share of the requests.
    Raises ConfigError for a task that is unknown or whose data cannot be loaded, and ModelError for
    a model or adapter that cannot be loaded or whose outputs are not finite.
    """
    planned = plan_tasks(config.tasks, config.tasks_dir)
    transformers.set_seed(config.seed)  # for the few tasks with sampled answers
    with tempfile.TemporaryDirectory(prefix="selectmoe-eval-") as cache:
        with quiet():
            tasks = LmEvalTasks(planned, config.tasks_dir, cache=Path(cache))
            loaded = {task.name: tasks.load(task) for task in planned if task.kind != "answer_loss"}
            shots = _fewshot_of(config, planned, loaded)
            replicas = Replicas(load_lm(config, device=device), others)
        for task in planned:
            started = time.perf_counter()
            before = replicas.num_truncated
            with quiet() as truncations:
                if task.kind == "answer_loss":
                    results = [_answer_loss(task, replicas, config.limit)]
                else:
                    results = _run(
                        task.name, replicas.lm, loaded[task.name], config, shots[task.name]
                    )
            seconds = round(time.perf_counter() - started, 3)
            num_truncated = truncations.num_truncated + replicas.num_truncated - before
            yield from _with_costs(results, seconds=seconds, num_truncated=num_truncated)


def load_lm(config: EvaluateConfig, *, device: str) -> Any:  # noqa: ANN401 (lm-eval's HFLM)
    """The model, adapter and tokenizer of a run behind lm-eval's interface."""
    with quiet():
        of_lm_eval, of_model = split_model_args(config)
        model, tokenizer = load_target(config, device=device, settings=of_model)
        return wrap_model(model, tokenizer, config, device=device, arguments=of_lm_eval)


def _with_costs(
    results: Sequence[TaskResult], *, seconds: float, num_truncated: int
) -> Iterator[TaskResult]:
    """Adds the costs to a group or a single task, not to each task in a group."""
    heads = {result.task for result in top_level(results)}
    for result in results:
        if result.task in heads:
            result = dataclasses.replace(result, seconds=seconds, num_truncated=num_truncated)
        yield result


def require_in_index(planned: Sequence[PlannedTask], tasks_dir: str | None) -> None:
    """Raises ConfigError for a name that lm-eval does not know."""
    with quiet(), tempfile.TemporaryDirectory(prefix="selectmoe-eval-") as cache:
        tasks = LmEvalTasks(planned, tasks_dir, cache=Path(cache))
        for task in planned:
            tasks.require_known(task)


class LmEvalTasks:
    """Builds the tasks; indexes lm-eval's 14,000 task files only if one of them is requested."""

    def __init__(
        self, planned: Sequence[PlannedTask], tasks_dir: str | None, *, cache: Path
    ) -> None:
        from lm_eval.tasks import TaskManager

        folders = [SHIPPED_TASKS, *([Path(tasks_dir)] if tasks_dir is not None else [])]
        files = {name: file for folder in folders for name, file in task_files(folder).items()}
        requested = {task.name for task in planned if task.kind == "by_name"}
        self.cache = str(cache)
        # Indexing its own task files takes lm-eval several seconds.
        needs_index = not requested <= _self_contained(files)
        self.manager = TaskManager(include_path=folders, include_defaults=needs_index, metadata={})
        self._resolve_data_files(folders)

    def require_known(self, task: PlannedTask) -> None:
        """Raises ConfigError with the nearest name for a task that is not in the index."""
        if task.kind == "by_name" and task.name not in self.manager.task_index:
            known = list(self.manager.task_index)
            raise ConfigError(f"unknown task {task.name!r}{nearest(task.name, known)}")

    def load(self, task: PlannedTask) -> Any:  # noqa: ANN401 (lm-eval's TaskDict)
        """The task with its data loaded. Raises ConfigError if that fails."""
        self.require_known(task)
        spec: str | dict[str, Any] = task.name
        if task.kind == "choices":
            config = choices_config(task)
            assert task.file is not None
            folder = Path(tempfile.mkdtemp(dir=self.cache))
            rows = write_for_lm_eval(task.file, folder)
            config["dataset_kwargs"] = {"data_files": {"test": str(rows)}, "cache_dir": self.cache}
            spec = config
        try:
            return self.manager.load([spec])
        except Exception as error:  # the hub's clients and lm-eval's checks raise all types
            raise ConfigError(f"task {task.name}: {_loading_reason(error)}") from error

    def _resolve_data_files(self, folders: Sequence[Path]) -> None:
        """lm-eval would resolve data files relative to the working directory of the worker."""
        from lm_eval.tasks._yaml_loader import load_yaml

        roots = [folder.resolve() for folder in folders]
        for entry in self.manager.task_index.values():
            file = entry.yaml_path
            if file is None or not any(file.resolve().is_relative_to(root) for root in roots):
                continue
            try:
                config = with_absolute_files(load_yaml(file), file.parent)
            except Exception as error:  # task files can run any code
                raise ConfigError(f"{file} is not a task file: {first_line(error)}") from error
            if "dataset_kwargs" in config:
                config["dataset_kwargs"].setdefault("cache_dir", self.cache)
                entry.cfg, entry.yaml_path = config, None


def _self_contained(files: Mapping[str, Path]) -> set[str]:
    """The tasks in task files, and the groups that consist of these alone."""
    configs = {name: read_task_file(file) for name, file in files.items()}
    tasks = {name for name, config in configs.items() if config.get("task") == name}
    groups = {name: config["task"] for name, config in configs.items() if "group" in config}
    return tasks | {
        name
        for name, members in groups.items()
        if isinstance(members, list) and all(member in tasks for member in map(str, members))
    }


def _loading_reason(error: BaseException) -> str:
    """One line; says so if the hub could not be reached."""
    kinds = {type(link).__name__ for link in _chain(error)}
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError"}
    if kinds & offline or "Couldn't reach" in str(error):
        return (
            "its dataset is neither in the local cache nor could it be downloaded from the hub "
            f"({first_line(error)})"
        )
    return f"cannot be loaded: {type(error).__name__}: {first_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fewshot_of(
    config: EvaluateConfig, planned: Sequence[PlannedTask], loaded: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Numbers of few-shot examples by requested task and by the task within it.

    A number for all tasks leaves those alone that are defined to have none, as lm-eval does.
    A number of another task is not used, such as one of a preset whose tasks were changed; raises
    ConfigError if lm-eval knows no such name.
    """
    for_all, by_name = fewshot_numbers(config.num_fewshot)
    known = {task.name for task in planned}
    shots: dict[str, dict[str, int]] = {}
    for name, tasks in loaded.items():
        known |= tasks["tasks"].keys()
        shots[name] = numbers = {}
        for inner, task in tasks["tasks"].items():
            default = None if task.get_config("num_fewshot") == 0 else for_all
            number = by_name.get(inner, by_name.get(name, default))
            if number is not None:
                numbers[inner] = number
    folder = lm_eval_task_files()
    assert folder is not None
    if unknown := sorted(absent_names(by_name.keys() - known, folder)):
        name = unknown[0]
        raise ConfigError(f"num_fewshot: unknown task {name!r}{nearest(name, sorted(known))}")
    return shots


def _run(
    name: str,
    lm: Any,  # noqa: ANN401 (lm-eval's HFLM)
    loaded: Any,  # noqa: ANN401 (lm-eval's TaskDict)
    config: EvaluateConfig,
    shots: Mapping[str, int],
) -> list[TaskResult]:
    """shots: number of few-shot examples by name of a task, where it is not the task's own."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    for task_name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=shots.get(task_name, own or 0))
        task.set_fewshot_seed(seed=config.seed)
    try:
        results = lm_evaluate(
            lm=lm,
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
        )
    except ValueError as error:  # a task that runs code, or that needs images
        raise ConfigError(f"task {name}: {first_line(error)}") from error
    return [_task_result(task, results) for task in results["results"]]


def _task_result(task: str, results: Mapping[str, Any]) -> TaskResult:
    entries, samples = results["results"][task], results["samples"].get(task, [])
    better = results["higher_is_better"].get(task, {})
    metrics = {}
    values = finite_numbers(entries)
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        metrics[_metric_name(metric, filter_name)] = MetricValue(
            value, error, better.get(metric) is not False
        )
    counts = results["n-samples"]
    subtasks = tuple(results["group_subtasks"].get(task, ()))
    version = results["versions"].get(task)
    return TaskResult(
        task=task,
        metrics=metrics,
        num_samples=counts[task]["effective"] if task in counts else entries.get("sample_len", 0),
        num_fewshot=results["n-shot"].get(task, 0),
        version=None if version is None else str(version),
        subtasks=subtasks,
        samples=_sample_values(task, samples),
    )


def _sample_values(task: str, samples: Sequence[Mapping[str, Any]]) -> tuple[SampleValues, ...]:
    """lm-eval has one entry per row and filter; this one per row, its metrics named by filter."""
    samples_by_key: dict[str, SampleValues] = {}
    for entry in samples:
        responses = _to_json(entry["filtered_resps"])
        _require_finite(task, entry["doc_id"], responses)
        key = f"{entry['doc_id']}:{entry['doc_hash'][:12]}"
        sample = samples_by_key.setdefault(
            key, SampleValues(key, {}, details={"target": _to_json(entry["target"])})
        )
        sample.details.setdefault("responses", responses)
        values = finite_numbers({name: entry[name] for name in entry["metrics"]})
        for metric, value in values.items():
            sample.values[_metric_name(metric, entry["filter"])] = value
    return tuple(samples_by_key.values())


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _require_finite(task: str, doc_id: int, responses: object) -> None:
    """A model that outputs NaN would otherwise count as wrong, or as right by chance."""
    if isinstance(responses, list):
        for entry in responses:
            _require_finite(task, doc_id, entry)
    elif isinstance(responses, float) and not math.isfinite(responses):
        raise ModelError(
            f"task {task}: the model's log-likelihood of row {doc_id} is not finite, got "
            f"{responses}"
        )


def _to_json(value: Any) -> Any:  # noqa: ANN401 (any response)
    """Numbers, strings and lists of them."""
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _hash(sample: Sample) -> str:
    """Hash of the messages, which identifies a row across runs."""
    messages = [
        [message.role, message.content, *filter(None, [content_key(message)])]
        for message in sample.messages
    ]
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]


def _answer_loss(task: PlannedTask, replicas: Replicas, limit: int | None) -> TaskResult:
    assert task.file is not None
    conversations = read_conversations(task.file)[:limit]
    losses, rejected = replicas.answer_losses(conversations)
    if not losses:
        raise ModelError(
            f"task {task.name}: none of {len(conversations)} conversations can be evaluated; "
            f"first: {describe(rejected[0])}"
        )
    samples = tuple(
        SampleValues(
            f"{loss.position}:{_hash(conversations[loss.position])}",
            {
                "nll_per_token": loss.nll / loss.num_tokens,
                "nll_per_byte": loss.nll / loss.num_bytes,
            },
            {"nll_per_token": loss.num_tokens, "nll_per_byte": loss.num_bytes},
            {"id": conversations[loss.position].sample_id},
        )
        for loss in losses
    )
    return TaskResult(
        task=task.name,
        metrics={
            name: aggregate(samples, name, higher_is_better=False)
            for name in ("nll_per_token", "nll_per_byte")
        },
        num_samples=len(samples),
        num_left_out=dict(sorted(Counter(row.reason for row in rejected).items())),
        version="1.0",
        samples=samples,
        rejected=tuple(rejected),
    )
