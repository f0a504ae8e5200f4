"""Runs tasks on a model with lm-eval's own API, and silently: what matters comes back as results.

>>> for result in evaluate(config, device="cpu"):
...     print(result.task, result.metrics["acc"].value)
"""

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import ConfigError, ModelError
from selectmoe.evaluation.answer_loss import answer_losses
from selectmoe.evaluation.local_tasks import (
    SHIPPED_TASKS,
    PlannedTask,
    choices_config,
    nearest,
    plan_tasks,
    read_conversations,
    read_task_file,
    task_files,
    with_absolute_files,
)
from selectmoe.evaluation.quiet_lm_eval import quiet
from selectmoe.evaluation.target_model import load_target
from selectmoe.evaluation.task_results import (
    MetricValue,
    SampleValues,
    TaskResult,
    aggregated,
    numbers,
    shown,
)
from selectmoe.model.quiet_loading import first_line
from selectmoe.records import Sample

# lm-eval tries the largest batch first, and on a CPU nothing stops it but the memory's end.
CPU_BATCH_SIZE = 16
# For the few metrics whose standard error has no formula; lm-eval's 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1_000


def evaluate(config: EvaluateConfig, *, device: str) -> Iterator[TaskResult]:
    """One result for each task as it is done, and for each task inside a group.

    Raises ConfigError for a task that is unknown or whose data cannot be had, and ModelError for
    a model or adapter that cannot be loaded or gives no finite numbers.
    """
    planned = plan_tasks(config.tasks, config.tasks_dir)
    transformers.set_seed(config.seed)  # for the few tasks whose answers are drawn
    with tempfile.TemporaryDirectory(prefix="selectmoe-eval-") as cache:
        with quiet():
            tasks = LmEvalTasks(planned, config.tasks_dir, cache=Path(cache))
            loaded = {task.name: tasks.load(task) for task in planned if task.kind != "answer_loss"}
            model, tokenizer = load_target(config, device=device)
            lm = _wrapped(model, tokenizer, config, device)
        for task in planned:
            started = time.perf_counter()
            with quiet() as noise:
                if task.kind == "answer_loss":
                    results = [_answer_loss(task, lm, config.limit)]
                else:
                    results = _run(task.name, lm, loaded[task.name], config)
            seconds = round(time.perf_counter() - started, 3)
            yield from _with_costs(results, seconds=seconds, num_truncated=noise.num_truncated)


def _with_costs(
    results: Sequence[TaskResult], *, seconds: float, num_truncated: int
) -> Iterator[TaskResult]:
    """What it took is told of a group or a single task, not of each task in a group."""
    heads = {result.task for result in shown(results)}
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
    """Builds lm-eval's tasks; knows its own 14,000 names only where one of them is asked for."""

    def __init__(
        self, planned: Sequence[PlannedTask], tasks_dir: str | None, *, cache: Path
    ) -> None:
        from lm_eval.tasks import TaskManager

        folders = [SHIPPED_TASKS, *([Path(tasks_dir)] if tasks_dir is not None else [])]
        files = {name: file for folder in folders for name, file in task_files(folder).items()}
        asked = {task.name for task in planned if task.kind == "by_name"}
        self.cache = str(cache)
        # Reading its own task files takes lm-eval seconds.
        self.manager = TaskManager(
            include_path=folders, include_defaults=not asked <= _complete(files), metadata={}
        )
        self._find_files_from_their_folder(folders)

    def require_known(self, task: PlannedTask) -> None:
        """Raises ConfigError, with the nearest name, for one that is not in the index."""
        if task.kind == "by_name" and task.name not in self.manager.task_index:
            known = list(self.manager.task_index)
            raise ConfigError(f"unknown task {task.name!r}{nearest(task.name, known)}")

    def load(self, task: PlannedTask) -> Any:  # noqa: ANN401 (lm-eval's TaskDict)
        """The task with its rows read. Raises ConfigError, with the task's name, if they cannot."""
        self.require_known(task)
        spec: str | dict[str, Any] = task.name
        if task.kind == "choices":
            config = choices_config(task)
            config["dataset_kwargs"]["cache_dir"] = self.cache
            spec = config
        try:
            return self.manager.load([spec])
        except Exception as error:  # the hub's clients and lm-eval's own checks raise every kind
            raise ConfigError(f"task {task.name}: {_loading_reason(error)}") from error

    def _find_files_from_their_folder(self, folders: Sequence[Path]) -> None:
        """lm-eval would look for data files in the folder that a worker happens to run in."""
        from lm_eval.tasks._yaml_loader import load_yaml

        roots = [folder.resolve() for folder in folders]
        for entry in self.manager.task_index.values():
            file = entry.yaml_path
            if file is None or not any(file.resolve().is_relative_to(root) for root in roots):
                continue
            try:
                config = with_absolute_files(load_yaml(file), file.parent)
            except Exception as error:  # its functions are somebody's code
                raise ConfigError(f"{file}: not a task file: {first_line(error)}") from error
            if "dataset_kwargs" in config:
                config["dataset_kwargs"].setdefault("cache_dir", self.cache)
                entry.cfg, entry.yaml_path = config, None


def _complete(files: Mapping[str, Path]) -> set[str]:
    """The names in task files that need no other: of tasks, and of groups of these alone."""
    configs = {name: read_task_file(file) for name, file in files.items()}
    tasks = {name for name, config in configs.items() if config.get("task") == name}
    groups = {name: config["task"] for name, config in configs.items() if "group" in config}
    return tasks | {
        name
        for name, members in groups.items()
        if isinstance(members, list) and all(member in tasks for member in map(str, members))
    }


def _loading_reason(error: BaseException) -> str:
    """One line; where the hub was wanted and not to be had, that."""
    kinds = {type(link).__name__ for link in _chain(error)}
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError"}
    if kinds & offline or "Couldn't reach" in str(error):
        return (
            "its data set is on the hub, which cannot be reached, and not in this machine's cache "
            f"({first_line(error)})"
        )
    return f"cannot be loaded: {type(error).__name__}: {first_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wrapped(
    model: Any,  # noqa: ANN401 (a PreTrainedModel or a PeftModel)
    tokenizer: Any,  # noqa: ANN401 (a tokenizer of either kind)
    config: EvaluateConfig,
    device: str,
) -> Any:  # noqa: ANN401 (lm-eval's HFLM)
    """lm-eval's view of the model.

    Loaded by us and not by its `pretrained=` and `peft=`: with an adapter these cut the vocabulary
    down to the tokenizer's, so that a model and its adapter would not be measured alike.
    """
    from lm_eval.models.huggingface import HFLM

    automatic = CPU_BATCH_SIZE if device == "cpu" else "auto"
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size or automatic)


def _run(
    name: str,
    lm: Any,  # noqa: ANN401 (lm-eval's HFLM)
    loaded: Any,  # noqa: ANN401 (lm-eval's TaskDict)
    config: EvaluateConfig,
) -> list[TaskResult]:
    from lm_eval.evaluator import evaluate as lm_evaluate

    for task in loaded["tasks"].values():
        shots = config.num_fewshot
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=config.seed)
    try:
        results = lm_evaluate(
            lm=lm,
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
        )
    except ValueError as error:  # a task that runs code, or that wants images
        raise ConfigError(f"task {name}: {first_line(error)}") from error
    return [_task_result(task, results) for task in results["results"]]


def _task_result(task: str, results: Mapping[str, Any]) -> TaskResult:
    entries, samples = results["results"][task], results["samples"].get(task, [])
    better = results["higher_is_better"].get(task, {})
    metrics = {}
    for key, value in numbers(entries).items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = numbers({"stderr": entries.get(f"{metric}_stderr,{filter_name}")}).get("stderr")
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
    """lm-eval has an entry a row and filter; ours is one a row, its metrics named by filter."""
    found: dict[str, SampleValues] = {}
    for entry in samples:
        responses = _plain(entry["filtered_resps"])
        _require_finite(task, entry["doc_id"], responses)
        key = f"{entry['doc_id']}:{entry['doc_hash'][:12]}"
        sample = found.setdefault(
            key, SampleValues(key, {}, details={"target": _plain(entry["target"])})
        )
        sample.details.setdefault("responses", responses)
        for metric, value in numbers({name: entry[name] for name in entry["metrics"]}).items():
            sample.values[_metric_name(metric, entry["filter"])] = value
    return tuple(found.values())


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _require_finite(task: str, doc_id: int, responses: object) -> None:
    """A model that gives NaN would else be counted as wrong, or as right by chance."""
    if isinstance(responses, list):
        for entry in responses:
            _require_finite(task, doc_id, entry)
    elif isinstance(responses, float) and not math.isfinite(responses):
        raise ModelError(
            f"task {task}: the model's log-likelihood of row {doc_id} is not finite, got "
            f"{responses}"
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 (whatever a task answers)
    """Numbers, texts and lists of them, as JSON has them."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _hash(sample: Sample) -> str:
    """Of what is said; a row counts as the same in two runs where this is."""
    said = [[message.role, message.content] for message in sample.messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def _answer_loss(task: PlannedTask, lm: Any, limit: int | None) -> TaskResult:  # noqa: ANN401 (HFLM)
    assert task.file is not None
    conversations = read_conversations(task.file)[:limit]
    losses, left_out = answer_losses(
        lm.model, lm.tokenizer, conversations, max_sequence_length=lm.max_length
    )
    if not losses:
        raise ModelError(
            f"task {task.name}: none of {len(conversations)} conversations can be asked: "
            f"the first is {left_out[0].reason}"
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
    reasons = [entry.reason for entry in left_out]
    return TaskResult(
        task=task.name,
        metrics={
            name: aggregated(samples, name, higher_is_better=False)
            for name in ("nll_per_token", "nll_per_byte")
        },
        num_samples=len(samples),
        num_left_out={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        version="1.0",
        samples=samples,
    )
