"""What stages 1 and 3 share: a training function on the workers of a Ray cluster.

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

`save_steps` is all that checkpoints need. Each is kept as `<output>/checkpoint-<step>` (or below
`scaling.storage_path`), the newest `scaling.num_checkpoints` of them. A worker that is lost makes
Ray start all of them again, up to `scaling.max_failures` times, each time from the newest
checkpoint; the same call with the same output goes on from there too.

A SelectMoeError of a worker reaches the caller as it is. Where all workers agree to stop (a loss
that is NaN on one of them), raise TrainingStoppedError on each: that is not tried again.
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

from jobs.on_ray.errors import user_mistake
from jobs.on_ray.session import ClusterError
from selectmoe.config.scaling import ScalingConfig
from selectmoe.errors import SelectMoeError
from selectmoe.training.metrics_lines import METRICS_NAME
from selectmoe.training.stopping import TrainingStoppedError
from selectmoe.training.worker import TrainingWorker

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
# Every checkpoint waits for the next of Ray's looks at the workers, which are 2 s apart otherwise.
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
    this process for each line that a worker appends to `<output>/metrics.jsonl`, since what
    workers print is not seen here.
    Raises ClusterError where the cluster has not the workers, and a worker's SelectMoeError or
    OSError as it is. Whatever else a worker raises becomes a TrainingError.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, TrainingFailedError
    from ray.train import ScalingConfig as RayScalingConfig
    from ray.train.torch import TorchTrainer

    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    nodes = alive_nodes()
    with_gpu = trains_on_gpu(scaling, nodes)
    require_workers(scaling, nodes, with_gpu=with_gpu)
    storage_path, name = storage_of(output, scaling.storage_path)
    trainer = TorchTrainer(
        _run_worker,  # type: ignore[arg-type]  # its annotation allows no returned value
        train_loop_config={
            "train": train, "config": config, "output": output, "uses_gpu": with_gpu,
            "num_threads": scaling.num_cpus_per_worker,
        },
        scaling_config=RayScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=with_gpu,
            resources_per_worker=_resources(scaling, with_gpu=with_gpu),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=scaling.num_checkpoints),
        ),
    )  # fmt: skip
    logger.info("training on %s", _described(scaling, with_gpu=with_gpu))
    try:
        answer = _fit_and_show(trainer, output / METRICS_NAME, show).return_value
    except TrainingFailedError as error:
        raise _mistake_of(error) or TrainingError(_stop_message(error, output)) from error
    if isinstance(answer, SelectMoeError | OSError):
        raise answer
    return answer


def alive_nodes() -> list[Resources]:
    """What each node of the cluster has, in use or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def trains_on_gpu(scaling: ScalingConfig, nodes: Sequence[Resources]) -> bool:
    """The setting, or whether the cluster has any GPU."""
    if scaling.use_gpu is not None:
        return scaling.use_gpu
    return any(node.get("GPU", 0) >= 1 for node in nodes)


def require_workers(scaling: ScalingConfig, nodes: Sequence[Resources], *, with_gpu: bool) -> None:
    """Raises ClusterError where the cluster has not as many workers, and says what it has."""
    needed = _resources(scaling, with_gpu=with_gpu)
    fitting = sum(
        min(int(node.get(resource, 0) // amount) for resource, amount in needed.items())
        for node in nodes
    )
    if scaling.wait_for_nodes or scaling.num_workers <= fitting:
        return
    cpus, gpus = (int(sum(node.get(resource, 0) for node in nodes)) for resource in ("CPU", "GPU"))
    takes = " and ".join(f"{amount} {resource}" for resource, amount in needed.items())
    raise ClusterError(
        f"scaling.num_workers must be at most {fitting}, got {scaling.num_workers}: the cluster "
        f"has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node(s), and a worker takes {takes}; on "
        "a cluster that grows set scaling.wait_for_nodes=true"
    )


def storage_of(output: Path, storage_path: str | None) -> tuple[str, str]:
    """Ray's storage path and the run's name in it: checkpoints go to <path>/<name>/checkpoint-N.

    Left to itself that is the run's own folder; elsewhere its name tells the runs apart.
    """
    if storage_path is None:
        return str(output.parent), output.name
    return storage_path, "_".join(output.parts[-3:])


def _resources(scaling: ScalingConfig, *, with_gpu: bool) -> dict[str, int]:
    """What Ray reserves for a worker."""
    return {"CPU": scaling.num_cpus_per_worker, **({"GPU": 1} if with_gpu else {})}


def _described(scaling: ScalingConfig, *, with_gpu: bool) -> str:
    each = "a GPU" if with_gpu else f"{scaling.num_cpus_per_worker} CPU(s)"
    return f"{scaling.num_workers} worker(s) with {each} each"


def _fit_and_show(trainer: Any, file: Path, show: Callable[[Metrics], None] | None) -> Any:  # noqa: ANN401
    """`trainer.fit()`, and `show` for every line that comes into `file` meanwhile.

    Ray runs in a thread of its own: in the main one it would take Ctrl-C for itself, and leave
    with another status than an interrupted command has.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["answer"] = trainer.fit()
        except BaseException as error:  # raised again below, where the caller waits
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
    """Each time it is asked, the whole lines that came since; none of those of before.

    Read from the beginning, not from where the last reading ended: workers that start again from a
    checkpoint put a file in this one's place that lacks the lines of the steps they do again.
    """
    known = _whole_lines(file)
    while True:
        lines = _whole_lines(file)
        pairs = zip(known, lines, strict=False)
        num_same = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
        yield lines[min(len(known), len(lines)) if num_same is None else num_same :]
        known = lines


def _whole_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.is_file() else []


def _run_worker(settings: dict[str, Any]) -> object:
    """What runs on each worker."""
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
        try:
            return settings["train"](settings["config"], worker)
        except TrainingStoppedError as error:
            return error  # every worker returns it; raised, Ray would try it again
        except (SelectMoeError, OSError) as error:
            # Alone it may return. Beside others it must raise: they wait for it in a collective,
            # which ends only when Ray ends them.
            if worker.num_workers == 1:
                return error
            raise


def _checkpoint_callback() -> Any:  # noqa: ANN401
    from transformers import TrainerCallback

    # No class statement: this module travels by value, and the pickling does not see the names that
    # stand in a class's body inside a function.
    return type("ReportCheckpoints", (TrainerCallback,), {"on_save": _report_checkpoint})()


def _report_checkpoint(_: Any, args: Any, state: Any, control: Any, **__: Any) -> None:  # noqa: ANN401
    """Metrics from every rank, which Ray waits for, and the files that each wrote itself.

    That is the checkpoint on rank 0. The others' folders, since no two workers share one, hold
    their random state; Ray puts all in one folder.
    """
    import ray.train

    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    wrote = folder.is_dir() and any(folder.iterdir())
    ray.train.report(
        _last_logged(state.log_history) | {"step": state.global_step},
        checkpoint=ray.train.Checkpoint.from_directory(folder) if wrote else None,
        checkpoint_dir_name=folder.name,
    )


def _last_logged(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The newest value of everything that Trainer has logged."""
    return {
        key: float(value)
        for log in log_history
        for key, value in log.items()
        if isinstance(value, int | float)
    }


def _mistake_of(error: BaseException) -> SelectMoeError | OSError | None:
    """What a user can mend among what the workers raised; of several, the lowest rank's."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    mistakes = (user_mistake(failures[rank]) for rank in sorted(failures))
    return next((mistake for mistake in mistakes if mistake is not None), None)


def _stop_message(error: BaseException, output: Path) -> str:
    """One line for a person; the whole story goes to a file."""
    details = output / "training_error.txt"
    details.write_text(str(error), encoding="utf-8")
    last = str(error).strip().splitlines()[-1]
    return f"training stopped: {last}; details: {details}; go on with --resume {output}"


class TrainingError(SelectMoeError, RuntimeError):
    """Workers were lost more often than allowed, or failed in a way that is not the user's."""
