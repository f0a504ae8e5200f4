"""jobs/pretrain.py as a user runs it: a real local Ray, two workers, kills and resumptions."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.scoring.calibration import describe
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.training.worker import TrainingWorker
from tests.warmup_run import warm_up

pytestmark = pytest.mark.timeout(300)

SETTINGS = {
    "dataset.subset_ratio": 0.3, "dataset.max_sequence_length": 128, "max_rejected": 1.0,
    "training.num_steps": 60, "training.effective_batch_size": 6, "training.logging_steps": 5,
    "training.save_steps": 10,
}  # fmt: skip
OVERRIDES = [f"{key}={value}" for key, value in SETTINGS.items()]
GATES = "full_rank_weights.safetensors"


@pytest.fixture
def pretrain(make_job):
    return make_job("pretrain")


@pytest.fixture
def pretrain_here(command_here):
    return command_here("pretrain")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run in one process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    worker = TrainingWorker(output=folder, scratch=folder / "scratch")
    warm_up(from_values(WarmupConfig, SETTINGS), worker)
    return folder


def metrics(output: Path) -> list[dict]:
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def require_same(output: Path, undisturbed: Path) -> None:
    """1e-4 is what the issue asks of gates and loss; a lost batch would show at 1e-3."""
    gates, expected = load_file(output / GATES), load_file(undisturbed / GATES)
    assert gates.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (gates[name] - tensor).abs().max() < 1e-4, name
    rows, theirs = metrics(output), metrics(undisturbed)
    assert [row["step"] for row in rows] == [row["step"] for row in theirs]
    assert rows[-1]["loss"] == pytest.approx(theirs[-1]["loss"], abs=1e-4)


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not any(row["step"] >= step for row in metrics(output)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_workers_give_the_gates_of_one_and_lose_one_of_them_on_the_way(
    pretrain, undisturbed, tmp_path
):
    output = tmp_path / "run"
    process = pretrain.start("--output", output, "--num-workers", "2", *OVERRIDES)
    wait_for_step(output, 25, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=250)
    assert process.returncode == 0, printed
    require_same(output, undisturbed)
    assert "step 60 of 60: loss" in printed
    assert str(output / GATES) in printed
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["num_steps"] == 60
    assert manifest["last_metrics"]["loss"] == pytest.approx(metrics(output)[-1]["loss"])
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-50", "checkpoint-60"}
    assert (output / "checkpoint-60" / "rng_state_1.pth").is_file()
    assert list((output / "tensorboard").glob("events*"))
    assert "Good probability by layer" in (output / "report.html").read_text("utf-8")
    # Stage 2 takes the folder as it is.
    calibration = ScoringEngine.from_pretrained(model_checkpoint_path=output).calibration
    assert calibration.num_samples == manifest["data"]["num_rows"]
    assert manifest["calibration"] == describe(calibration)
    assert f"calibrated on {calibration.num_samples} rows of the corpus" in printed
    assert printed.count("calibrating: ") == 1


def test_a_killed_run_is_resumed_to_the_same_gates(pretrain, pretrain_here, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = pretrain.start("--output", output, *OVERRIDES)
    wait_for_step(output, 15, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / GATES).exists()
    time.sleep(3)  # Ray notices that its driver is gone, and ends the worker
    printed = pretrain_here.run("--resume", output)
    require_same(output, undisturbed)
    # From a checkpoint: the last one, where the worker was quick enough to finish without a driver.
    assert "step 5 of 60" not in printed


def test_a_loss_that_is_no_number_is_one_line_and_is_not_tried_again(pretrain_here, tmp_path):
    broken = tmp_path / "broken"
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR)
    model.model.norm.weight.data[0] = float("nan")
    model.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR).save_pretrained(broken)
    line = pretrain_here.refuse("--model", broken, "--output", tmp_path / "run", *OVERRIDES)
    assert "the loss of step 1 is not a finite number, in the batch of the samples 'demo-" in line


def test_more_workers_than_the_cluster_has_are_refused(pretrain_here, tmp_path):
    line = pretrain_here.refuse(
        "--output", tmp_path / "run", "training.effective_batch_size=9999", "--num-workers", "9999"
    )
    assert "scaling.num_workers must be at most" in line
    assert "got 9999: the cluster has" in line
