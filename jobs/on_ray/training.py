"""Runs the training function of stage 1 or 3 on the workers of a Ray cluster, with checkpoints.

A job calls `train_on_ray(train, config, ...)`; on every worker `train(config, worker)` runs inside
the process group that Ray has set up (NCCL on GPUs, gloo on CPUs), with transformers.Trainer:

    def train(config: FinetuneConfig, worker: TrainingWorker) -> dict[str, object]:
        trainer = Trainer(
            args=TrainingArguments(output_dir=str(worker.scratch), save_steps=50, ...),
            callbacks=[..., *worker.callbacks],  # one of them hands each checkpoint to Ray
            ...
        )
        trainer.train(resume_from_checkpoint=worker.resume_from)
        return {"final_loss": ...}  # rank 0's is what train_on_ray returns

`save_steps` is all that checkpoints need. The newest `scaling.num_checkpoints` of them are kept as
`<output>/checkpoint-<step>` (or below `scaling.storage_path`). When a worker is lost, Ray restarts
all of them from the newest checkpoint, up to `scaling.max_failures` times; the same call with the
same output resumes from there too.

A SelectMoeError of a worker reaches the caller; neither it nor another failure that a retry would
repeat (`selectmoe.training.failures`) is retried. Where all workers agree to stop (a loss that is
NaN on one of them), raise TrainingStoppedError on each.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.on_ray.errors import describe_cause, user_mistake, write_details
from jobs.on_ray.session import ClusterError, alive_nodes
from selectmoe.cli.command_line import collect_garbage_less_often
from selectmoe.config.scaling import ScalingConfig
from selectmoe.errors import SelectMoeError, TrainingStoppedError
from selectmoe.model.file_modes import follow_umask
from selectmoe.training.failures import (
    DETAILS_NAME,
    forget_failure,
    is_lasting,
    note_failure,
    noted_failure,
)
from selectmoe.training.metrics_lines import METRICS_NAME
from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
# Every checkpoint waits for Ray's next health check of the workers; the default is every 2 s.
RAY_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}

Metrics = Mapping[str, Any]
Resources = Mapping[str, float]


def train_on_ray(
    train: Callable[[Any, TrainingWorker], object],
    config: object,
    *,
    output: Path,
    scaling: ScalingConfig,
    show: Callable[[Metrics], None] | None = None,
) -> object:
    """Runs `train(config, worker)` on every worker; returns what rank 0 returned.

    Ray must be started (`start_ray(ray_training, <the module of train>)`: their code travels with
    the pickles). output: the folder of the run, on storage that all nodes share. show: called in
    this process with each row that a worker appends to `<output>/metrics.jsonl`, since the output
    of workers is not visible here.
    Raises ClusterError where the cluster has too few workers, and a worker's SelectMoeError or
    OSError unchanged. Any other exception of a worker becomes a TrainingError.
    """
    from ray.train import TrainingFailedError

    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    nodes = alive_nodes()
    with_gpu = trains_on_gpu(scaling, nodes)
    require_workers(scaling, nodes, with_gpu=with_gpu)
    settings = {
        "train": train, "config": config, "output": output, "uses_gpu": with_gpu,
        "num_threads": scaling.num_cpus_per_worker,
    }  # fmt: skip
    trainer = _ray_trainer(settings, output, scaling, with_gpu=with_gpu)
    logger.info("training on %s", _describe(scaling, with_gpu=with_gpu))
    forget_failure(output)
    try:
        answer = _fit_and_show(trainer, output / METRICS_NAME, show).return_value
    except TrainingFailedError as error:
        raise _mistake_of(error) or TrainingError(_stop_message(error, output)) from error
    if isinstance(answer, SelectMoeError | OSError):
        raise answer
    return answer


def _ray_trainer(
    settings: Mapping[str, object], output: Path, scaling: ScalingConfig, *, with_gpu: bool
) -> Any:  # noqa: ANN401 (Ray's TorchTrainer)
    """A trainer that calls `_run_worker(settings)` on every worker."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train import ScalingConfig as RayScalingConfig
    from ray.train.torch import TorchTrainer

    storage_path, name = storage_of(output, scaling.storage_path)
    return TorchTrainer(
        _run_worker,  # type: ignore[arg-type]  # its annotation allows no returned value
        train_loop_config=dict(settings),
        scaling_config=RayScalingConfig(
            num_workers=scaling.num_workers or 1,
            use_gpu=with_gpu,
            resources_per_worker=worker_resources(scaling, with_gpu=with_gpu),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=scaling.num_checkpoints),
        ),
    )


def trains_on_gpu(scaling: ScalingConfig, nodes: Sequence[Resources]) -> bool:
    """The setting, or whether the cluster has any GPU."""
    if scaling.use_gpu is not None:
        return scaling.use_gpu
    return any(node.get("GPU", 0) >= 1 for node in nodes)


def require_workers(scaling: ScalingConfig, nodes: Sequence[Resources], *, with_gpu: bool) -> None:
    """Raises ClusterError where the cluster has too few resources, and says what it has."""
    needed = worker_resources(scaling, with_gpu=with_gpu)
    max_workers = sum(
        min(int(node.get(resource, 0) // amount) for resource, amount in needed.items())
        for node in nodes
    )
    assert scaling.num_workers is not None
    if scaling.wait_for_nodes or scaling.num_workers <= max_workers:
        return
    cpus, gpus = (int(sum(node.get(resource, 0) for node in nodes)) for resource in ("CPU", "GPU"))
    per_worker = " and ".join(f"{amount} {resource}" for resource, amount in needed.items())
    raise ClusterError(
        f"scaling.num_workers must be at most {max_workers}, got {scaling.num_workers}: the "
        f"cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node(s), and a worker takes "
        f"{per_worker}; on a cluster that grows set scaling.wait_for_nodes=true"
    )


def storage_of(output: Path, storage_path: str | None) -> tuple[str, str]:
    """Ray's storage path and the run's name in it: checkpoints go to <path>/<name>/checkpoint-N.

    By default they are in the run's own folder; in another storage path the name is unique.
    """
    if storage_path is None:
        return str(output.parent), output.name
    return storage_path, "_".join(output.parts[-3:])


def worker_resources(scaling: ScalingConfig, *, with_gpu: bool) -> dict[str, float]:
    """What Ray reserves for a worker."""
    return {"CPU": scaling.num_cpus_per_worker, **({"GPU": 1} if with_gpu else {})}


def _describe(scaling: ScalingConfig, *, with_gpu: bool) -> str:
    each = "a GPU" if with_gpu else f"{scaling.num_cpus_per_worker} CPU(s)"
    return f"{scaling.num_workers} worker(s) with {each} each"


def _fit_and_show(trainer: Any, file: Path, show: Callable[[Metrics], None] | None) -> Any:  # noqa: ANN401
    """`trainer.fit()`, and `show` for every line that is appended to `file` meanwhile.

    `fit` runs in a thread: in the main one it would handle Ctrl-C itself and exit with another
    status than an interrupted command.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["answer"] = trainer.fit()
        except BaseException as error:  # raised again below, in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    lines = _new_lines(file)
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LOOKS)
        for line in next(lines):
            if show is not None:
                show(json.loads(line))
    if "error" in outcome:
        raise outcome["error"]
    return outcome["answer"]


def _new_lines(file: Path) -> Iterator[list[bytes]]:
    """Yields, on each `next`, the complete lines that were appended since the previous one.

    The file is read from the beginning: workers that restart from a checkpoint replace it by one
    without the lines of the steps that they repeat.
    """
    known = _complete_lines(file)
    while True:
        lines = _complete_lines(file)
        pairs = zip(known, lines, strict=False)
        num_same = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        yield lines[min(len(known), len(lines)) if num_same is None else num_same :]
        known = lines


def _complete_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []


def _run_worker(settings: dict[str, Any]) -> object:
    """Runs on each worker."""
    collect_garbage_less_often()
    import ray.train
    import torch

    context = ray.train.get_context()
    if not settings["uses_gpu"]:
        torch.set_num_threads(settings["num_threads"])
    scratch = Path(tempfile.mkdtemp(prefix="selectmoe-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        checkpoint = ray.train.get_checkpoint()
        folder = stack.enter_context(checkpoint.as_directory()) if checkpoint else None
        worker = TrainingWorker(
            output=settings["output"],
            scratch=scratch,
            rank=context.get_world_rank(),
            num_workers=context.get_world_size(),
            num_sharing=context.get_local_world_size(),
            uses_gpu=settings["uses_gpu"],
            resume_from=folder,
            callbacks=(_checkpoint_callback(),),
        )
        noted = noted_failure(worker.output)
        if noted is not None:  # of a worker that Ray has restarted since, together with this one
            return TrainingStoppedError(noted)
        try:
            if worker.uses_gpu:
                from selectmoe.model.devices import require_gpu

                require_gpu()
            return settings["train"](settings["config"], worker)
        except TrainingStoppedError as error:
            return error  # every worker returns it; Ray would retry an exception
        except Exception as error:
            lasting = is_lasting(error)
            if worker.num_workers > 1:
                # It must raise: the others wait for it in a collective until Ray restarts them all.
                if lasting:
                    note_failure(worker.output, error)
                raise
            if isinstance(error, SelectMoeError | OSError):
                return error
            if not lasting:
                raise
            return TrainingStoppedError(note_failure(worker.output, error))


def _checkpoint_callback() -> Any:  # noqa: ANN401
    from transformers import TrainerCallback

    # No class statement: this module is pickled by value, and cloudpickle misses the names that the
    # body of a class inside a function uses.
    return type("ReportCheckpoints", (TrainerCallback,), {"on_save": _report_checkpoint})()


def _report_checkpoint(_: Any, args: Any, state: Any, control: Any, **__: Any) -> None:  # noqa: ANN401
    """Reports metrics from every rank, since Ray waits for all, and the files that each wrote.

    Rank 0 writes the checkpoint. The other ranks write their random state, each into its own
    folder; Ray merges all of them into one.
    """
    import ray.train

    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    has_files = folder.is_dir() and any(folder.iterdir())
    if has_files:
        follow_umask(folder)
    ray.train.report(
        _last_logged(state.log_history) | {"step": state.global_step},
        checkpoint=ray.train.Checkpoint.from_directory(folder) if has_files else None,
        checkpoint_dir_name=folder.name,
    )


def _last_logged(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each metric that Trainer has logged."""
    return {
        key: float(value)
        for log in log_history
        for key, value in log.items()
        if isinstance(value, int | float)
    }


def _mistake_of(error: BaseException) -> SelectMoeError | OSError | None:
    """The first error among the workers' that a user can mend, by rank."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    mistakes = (user_mistake(failures[rank]) for rank in sorted(failures))
    return next((mistake for mistake in mistakes if mistake is not None), None)


def _stop_message(error: BaseException, output: Path) -> str:
    """One line for a person; the whole error goes to a file."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    cause = describe_cause(failures[min(failures)] if failures else error)
    details = write_details(output / DETAILS_NAME, error)
    return f"training stopped: {cause}{details}; resume with --resume {output}"


class TrainingError(SelectMoeError, RuntimeError):
    """Workers were lost more often than allowed, or failed for a reason that no user can mend."""
