"""The command of `jobs/evaluate.py`: run tasks on a model, save and print results; compare runs."""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import (
    absolute_model,
    absolute_path,
    claimed_run,
)
from selectmoe.config.code_version import code_version, library_versions
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.loading import resolved
from selectmoe.errors import SelectMoeError

if TYPE_CHECKING:
    from selectmoe.evaluation.replicas import Replica
    from selectmoe.evaluation.task_results import TaskResult

logger = logging.getLogger(__name__)

OPTIONS = {
    f"--{key.replace('_', '-')}": key
    for key in (
        "model", "adapter", "name", "tasks", "tasks_dir", "num_fewshot", "limit", "batch_size",
        "apply_chat_template", "model_args", "num_workers", "output", "compare",
    )
}  # fmt: skip
PATHS = {
    "model": absolute_model,
    "adapter": absolute_path,
    "tasks_dir": absolute_path,
    "compare": absolute_path,
}
LIBRARIES = ("lm_eval", "transformers", "torch", "peft", "datasets", "ray")
# Settings that config.json does not contain, since they do not affect results.
UNSAVED = ("output", "output_root")


def main(arguments: Sequence[str]) -> None:
    """Runs stage 4. Raises SelectMoeError for a mistake of the user."""
    config = parse(arguments)
    if config.compare:
        compare(config)
        return
    config = with_resolved_adapter(config)
    needs_hub = require_inputs(config)
    with claimed_run(config, free=UNSAVED, resume=False) as output:
        use_gpu = start_ray_for(config)
        config = with_num_workers(config, use_gpu=use_gpu)
        # Before the run: a checkout may move on meanwhile.
        described = about(config, use_gpu=use_gpu)
        results = []
        for result in run_on_ray(config, output, needs_hub=needs_hub, use_gpu=use_gpu):
            results.append(result)
            if result.seconds:  # not for the tasks of a group
                print(task_line(result), flush=True)
        from selectmoe.evaluation.run_files import SAMPLES_NAME, write_run

        name = config.name or output.name
        file = write_run(output, name=name, about=described, results=results)
        print(f"\n{output / SAMPLES_NAME}\n{file}", flush=True)


def parse(arguments: Sequence[str]) -> EvaluateConfig:
    """Options and `key=value` overrides as one checked configuration with absolute paths."""
    from selectmoe.evaluation.local_tasks import is_row_file

    prog = "jobs/evaluate.py"
    config = parse_config(EvaluateConfig, arguments, prog=prog, options=OPTIONS, paths=PATHS)
    # --tasks a,b and --tasks a b, as lm-eval's own command accepts them
    split = ([text] if Path(text).is_file() else text.split(",") for text in config.tasks)
    tasks = tuple(
        str(absolute_path(task, "--tasks")) if is_row_file(task) else task
        for task in itertools.chain.from_iterable(split)
    )
    return dataclasses.replace(config, tasks=tasks)


def require_inputs(config: EvaluateConfig) -> bool:
    """Raises for missing inputs before Ray starts; True if the hub may be needed."""
    from selectmoe.evaluation.local_tasks import (
        plan_tasks,
        require_known,
        ships_with_the_package,
    )
    from selectmoe.model.checkpoint import read_model_config
    from selectmoe.model.hub_access import hub_answers, work_offline
    from selectmoe.paths import model_or_embedded

    planned = plan_tasks(config.tasks, config.tasks_dir)
    from_hub = config.model is not None and not Path(config.model).is_dir()
    if from_hub and not hub_answers():
        work_offline()
    if config.model is not None:
        read_model_config(model_or_embedded(config.model, config.revision))
    require_known(planned, config.tasks_dir)
    return from_hub or not all(map(ships_with_the_package, planned))


def with_resolved_adapter(config: EvaluateConfig) -> EvaluateConfig:
    """Replaces the output folder of a stage 3 run with its last checkpoint, and a model that is
    not given with the adapter's base, in the revision that it names unless another one is given."""
    from selectmoe.training.adapter_folder import adapter_folder, base_model_of, base_revision_of

    if config.adapter is None:
        return config
    folder = adapter_folder(Path(config.adapter))
    model, revision = config.model, config.revision
    if model is None:
        model = base_model_of(folder)
        revision = revision or (base_revision_of(folder) if model else None)
    return dataclasses.replace(config, adapter=str(folder), model=model, revision=revision)


def start_ray_for(config: EvaluateConfig) -> bool:
    """Starts Ray; True if the run gets a GPU. Raises ClusterError if no node has the resources."""
    from jobs.on_ray.session import ClusterError, alive_nodes, start_ray
    from jobs.stage_4_eval import replica

    start_ray(sys.modules[__name__], replica)
    nodes = alive_nodes()
    has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
    num_gpus = int(has_gpu) if config.num_gpus is None else config.num_gpus
    fits = any(
        node.get("CPU", 0) >= config.num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes
    )
    if not fits and not config.wait_for_nodes:
        largest = max(int(node.get("CPU", 0)) for node in nodes)
        raise ClusterError(
            f"no node has num_cpus={config.num_cpus} and num_gpus={num_gpus}: the largest has "
            f"{largest} CPUs, and {'one has' if has_gpu else 'none has'} a GPU; "
            "wait_for_nodes=true waits for a suitable node"
        )
    return bool(num_gpus)


def with_num_workers(config: EvaluateConfig, *, use_gpu: bool) -> EvaluateConfig:
    """The configuration with a number of replicas: the given one, else one per free GPU.

    Raises ClusterError where the cluster has too few resources for the given number.
    """
    from jobs.on_ray.session import ClusterError, alive_nodes, num_free_gpus

    if config.num_workers is None:
        num_workers = max(num_free_gpus(), 1) if use_gpu else 1
        return dataclasses.replace(config, num_workers=num_workers)
    most = sum(
        int(min(node.get("CPU", 0) // config.num_cpus, node.get("GPU", 0) if use_gpu else 1e9))
        for node in alive_nodes()
    )
    if config.num_workers > most and not config.wait_for_nodes:
        raise ClusterError(
            f"num_workers must be at most {most}, got {config.num_workers}: a replica takes "
            f"{config.num_cpus} CPU(s){' and a GPU' if use_gpu else ''}; wait_for_nodes=true waits "
            "for nodes"
        )
    return config


def run_on_ray(
    config: EvaluateConfig, output: Path, *, needs_hub: bool, use_gpu: bool
) -> "Iterator[TaskResult]":
    """Yields the results of a Ray task, each as soon as it is available."""
    import ray

    from jobs.on_ray.errors import describe_cause, user_mistake, write_details
    from jobs.stage_4_eval.replica import RemoteReplica, ReplicaActor

    num_workers = config.num_workers or 1
    each = "a GPU" if use_gpu else f"{config.num_cpus} CPU(s)"
    where = each if num_workers == 1 else f"{num_workers} replicas with {each} each"
    logger.info("evaluating %s on %s", ", ".join(config.tasks), where)
    prepare = partial(prepare_process, config, needs_hub=needs_hub, use_gpu=use_gpu)
    actor: Any = ray.remote(num_cpus=config.num_cpus, num_gpus=int(use_gpu))(
        cast("Any", ReplicaActor)
    )
    others = [
        RemoteReplica(actor.remote(config, prepare, use_gpu=use_gpu))
        for _ in range(num_workers - 1)
    ]
    evaluate: Any = ray.remote(num_cpus=config.num_cpus, num_gpus=int(use_gpu), max_retries=0)(
        cast("Any", evaluate_tasks)
    )
    results = evaluate.options(num_returns="streaming").remote(
        config, prepare, use_gpu=use_gpu, others=others
    )
    try:
        for reference in results:
            yield ray.get(reference)
    except ray.exceptions.RayError as error:
        mistake = user_mistake(error)
        if mistake is not None:
            raise mistake from error
        reason, details = describe_cause(error), output / "evaluation_error.txt"
        raise EvaluationError(
            f"the evaluation failed: {reason}{write_details(details, error)}"
        ) from error


def evaluate_tasks(
    config: EvaluateConfig,
    prepare: Callable[[], None],
    *,
    use_gpu: bool,
    others: "Sequence[Replica]" = (),
) -> "Iterator[TaskResult]":
    """The Ray task: yields the result of each evaluation task when it is done.

    prepare: called before anything of torch or of the hub's clients is imported.
    """
    prepare()
    from selectmoe.evaluation.lm_eval_run import evaluate

    yield from evaluate(config, device="cuda" if use_gpu else "cpu", others=others)


def prepare_process(config: EvaluateConfig, *, needs_hub: bool, use_gpu: bool) -> None:
    """Sets a worker's access to the hub and its computing threads.

    needs_hub: a task or the model may have to be downloaded. Otherwise, or if the hub does not
    answer, the hub's clients are set offline, since they would retry for minutes.
    """
    from selectmoe.model.hub_access import hub_answers, work_offline

    if not (needs_hub and hub_answers()):
        work_offline()
    import torch

    from selectmoe.model.devices import require_gpu

    if use_gpu:
        require_gpu()
    else:
        torch.set_num_threads(config.num_cpus)


class EvaluationError(SelectMoeError, RuntimeError):
    """The worker died, or failed with an unexpected error."""


def task_line(result: "TaskResult") -> str:
    """demo_choices: acc 0.2750 ± 0.0409, acc_norm 0.3000 ± 0.0420 (120 rows, 3.1 s)."""
    metrics = ", ".join(
        f"{name} {metric.value:.4f}"
        + ("" if metric.standard_error is None else f" ± {metric.standard_error:.4f}")
        for name, metric in result.metrics.items()
    )
    counts = [f"{result.num_samples:,} rows"]
    counts += [f"{count} skipped: {reason}" for reason, count in result.num_left_out.items()]
    if result.num_truncated:
        counts.append(f"{result.num_truncated:,} passes truncated to fit the model")
    return f"{result.task}: {metrics} ({', '.join(counts)}, {result.seconds:.1f} s)"


def about(config: EvaluateConfig, *, use_gpu: bool) -> dict[str, object]:
    """The metadata of a results file."""
    from selectmoe.paths import model_or_embedded

    return {
        "model": model_or_embedded(config.model, config.revision),
        "adapter": config.adapter,
        "device": "cuda" if use_gpu else "cpu",
        "dtype": config.dtype or ("bfloat16" if use_gpu else "float32"),
        "config": resolved(config),
        "code": code_version(),
        "versions": library_versions(LIBRARIES),
    }


def compare(config: EvaluateConfig) -> None:
    """Prints and saves a table of the runs in config.compare."""
    from selectmoe.cli.report_command import report_of_stage
    from selectmoe.evaluation.results_table import compare_runs, to_text, write_table
    from selectmoe.evaluation.run_files import read_run

    runs = [read_run(Path(folder)) for folder in config.compare]
    table = compare_runs(runs, baseline=config.baseline)
    with claimed_run(config, free=(), resume=False) as output:
        as_json, as_markdown = write_table(table, output)
        report_of_stage(output)
    print(to_text(table))
    for run in runs:
        adapter = f"adapter {run.adapter}" if run.adapter else "no adapter"
        print(f"{run.name}: {run.folder}, {adapter}")
    print(f"{as_json}\n{as_markdown}", flush=True)
