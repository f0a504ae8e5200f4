"""The rim around Ray Train, as far as it goes without a cluster."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from jobs.on_ray.session import ClusterError
from jobs.on_ray.training import (
    TrainingError,
    _mistake_of,
    _new_lines,
    _stop_message,
    require_workers,
    storage_of,
    trains_on_gpu,
)
from selectmoe.config.scaling import ScalingConfig
from selectmoe.errors import DataError


def test_more_workers_than_the_cluster_has_are_refused_with_what_it_has():
    nodes = [{"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}]
    require_workers(ScalingConfig(num_workers=5), nodes, with_gpu=False)
    with pytest.raises(ClusterError) as refused:
        require_workers(ScalingConfig(num_workers=6), nodes, with_gpu=False)
    assert "scaling.num_workers must be at most 5, got 6" in str(refused.value)
    assert "the cluster has 5 CPUs and 1 GPUs on 2 node(s)" in str(refused.value)
    with pytest.raises(ClusterError, match=r"at most 1, got 2: .* a worker takes 1 CPU and 1 GPU"):
        require_workers(ScalingConfig(num_workers=2), nodes, with_gpu=True)


def test_a_worker_has_to_fit_on_one_node():
    scaling = ScalingConfig(num_workers=1, num_cpus_per_worker=4)
    with pytest.raises(ClusterError, match="at most 0, got 1"):
        require_workers(scaling, [{"CPU": 3.0}, {"CPU": 3.0}], with_gpu=False)


def test_a_cluster_that_grows_is_waited_for():
    require_workers(ScalingConfig(num_workers=8, wait_for_nodes=True), [], with_gpu=True)


def test_gpus_are_used_where_there_are_any_unless_told_otherwise():
    with_gpu, without = [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 2.0}], [{"CPU": 4.0}]
    assert trains_on_gpu(ScalingConfig(), with_gpu)
    assert not trains_on_gpu(ScalingConfig(), without)
    assert not trains_on_gpu(ScalingConfig(use_gpu=False), with_gpu)


def test_checkpoints_are_in_the_folder_of_the_run_unless_told_otherwise():
    output = Path("/runs/stage_1_pretrain/2026-01-31/12-00-00")
    path, name = storage_of(output, None)
    assert Path(path) / name == output
    assert storage_of(output, "s3://bucket/runs") == (
        "s3://bucket/runs",
        "stage_1_pretrain_2026-01-31_12-00-00",
    )


def test_only_whole_new_lines_of_the_metrics_are_shown(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"old\n")
    lines = _new_lines(file)
    shown = [next(lines)]
    for appended in (b"first\nsec", b"ond\n", b""):
        with file.open("ab") as stream:
            stream.write(appended)
        shown.append(next(lines))
    assert shown == [[], [b"first"], [b"second"], []]
    file.write_bytes(b"old\n")  # a resumed run has dropped what it does again
    assert next(lines) == []
    with file.open("ab") as stream:
        stream.write(b"again\n")
    assert next(lines) == [b"again"]


def test_a_file_that_was_replaced_between_two_looks_is_read_from_where_it_differs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"one\ntwo\n")
    lines = _new_lines(file)
    assert next(lines) == []
    file.write_bytes(b"one\ntwo, done again\nthree\n")  # longer than before, though a line is gone
    assert next(lines) == [b"two, done again", b"three"]
    file.write_bytes(b"one\n")
    assert next(lines) == []


def test_metrics_that_are_not_there_yet_are_waited_for(tmp_path):
    lines = _new_lines(tmp_path / "metrics.jsonl")
    assert list(itertools.islice(lines, 2)) == [[], []]
    (tmp_path / "metrics.jsonl").write_bytes(b"one\n")
    assert next(lines) == [b"one"]


def test_what_runs_on_workers_needs_no_checkout_there(repository):
    """start_ray pickles these modules by value; a name that this loses shows only on a worker."""
    pickled = (
        "import sys, pickle, ray.cloudpickle as cloudpickle\n"
        "from jobs.on_ray import training as ray_training\n"
        "from jobs.stage_1_pretrain import command\n"
        "for module in (command, ray_training):\n"
        "    cloudpickle.register_pickle_by_value(module)\n"
        "parts = (ray_training._run_worker, ray_training._checkpoint_callback, command.warm_up)"
        "\nsys.stdout.buffer.write(cloudpickle.dumps(parts))"
    )
    unpickled = (
        "import pickle, sys\n"
        "sys.modules['jobs'] = None\n"  # whoever imports it gets an ImportError
        "run, make_callback, warm_up = pickle.load(sys.stdin.buffer)\n"
        "print(type(make_callback()).__name__, warm_up.__name__)"
    )
    command = [sys.executable, "-c"]
    given = subprocess.run([*command, pickled], cwd=repository, capture_output=True, check=True)
    answer = subprocess.run(
        [*command, unpickled], cwd=repository, input=given.stdout, capture_output=True, check=False
    )
    assert answer.stdout.decode().split() == ["ReportCheckpoints", "warm_up"], answer.stderr


def test_a_users_mistake_is_found_among_the_workers_failures():
    mistake = DataError("no rows")
    group = WorkerGroupError("story", {2: mistake, 1: RuntimeError("connection lost")})
    assert _mistake_of(group) is mistake
    assert _mistake_of(WorkerGroupError("story", {0: RuntimeError("lost")})) is None


def test_any_other_failure_leaves_its_story_in_a_file_and_one_line(tmp_path):
    error = WorkerGroupError("[Rank 0]\nTraceback\nRuntimeError: lost", {0: RuntimeError("lost")})
    line = str(TrainingError(_stop_message(error, tmp_path)))
    assert "\n" not in line
    assert f"training stopped: RuntimeError: lost; details: {tmp_path}" in line
    assert "Traceback" in (tmp_path / "training_error.txt").read_text()
