"""jobs/finetune.py as a user runs it: a real local Ray, lost workers, resumption, mistakes."""

import dataclasses
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

from jobs.stage_3_finetune.command import main
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.corpus.normalize import write_shards
from selectmoe.data.readers import read_corpus
from selectmoe.errors import SelectMoeError
from selectmoe.finetune.stage import finetune
from selectmoe.finetune.supervised_data import prepare_supervised_rows
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.training.worker import TrainingWorker
from tests.job import Job

pytestmark = pytest.mark.timeout(300)

# 24 rows, 4 a step: 12 steps in two epochs.
SETTINGS = (
    "dataset.max_sequence_length=128", "training.num_epochs=2", "training.effective_batch_size=4",
    "training.batch_size=2", "training.learning_rate=1e-3", "training.lora.r=4",
    "training.lora.lora_alpha=16", "training.save_steps=3", "training.logging_steps=1",
    "max_rejected=1",
)  # fmt: skip
NUM_SELECTED, NUM_STEPS = 24, 12


@pytest.fixture
def command(make_job):
    return make_job("finetune")


@pytest.fixture
def finetune_here(command_here):
    return command_here("finetune")


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """What stage 2 leaves that stage 3 reads."""
    run = tmp_path_factory.mktemp("selection")
    lines = DEMO_CORPUS.read_text("utf-8").splitlines(keepends=True)
    (run / "selected_data.jsonl").write_text("".join(lines[:NUM_SELECTED]), "utf-8")
    write_shards(read_corpus(str(DEMO_CORPUS)), run / "corpus", rows_per_shard=256)
    (run / "manifest.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def finished(repository, selection, tmp_path_factory):
    """A run on one worker that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output = folder / "run"
    printed = Job(repository, folder, "finetune").run(
        "--data", selection, "--output", output, "--merge", *SETTINGS
    )
    return output, printed


def last_adapter(output: Path) -> dict:
    return load_file(output / f"checkpoint-{NUM_STEPS}" / "adapter_model.safetensors")


def metrics(output: Path) -> dict[int, dict]:
    """By step; of a step that was computed twice the last line."""
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def test_a_run_ends_with_an_adapter_its_metrics_and_a_manifest(finished):
    output, printed = finished
    assert sorted(metrics(output)) == list(range(1, NUM_STEPS + 1))
    assert f"step {NUM_STEPS} of {NUM_STEPS}" in printed
    assert str(output / "adapter") in printed
    assert list((output / "tensorboard").glob("events.*"))
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    assert manifest["num_steps"] == NUM_STEPS
    data = manifest["data"]
    assert data["num_read"] == NUM_SELECTED == data["num_rows"] + sum(data["num_rejected"].values())
    assert Path(manifest["adapter"], "adapter_config.json").is_file()
    assert manifest["checkpoint"] == str(output / f"checkpoint-{NUM_STEPS}")
    assert Path(manifest["merged"], "model.safetensors").is_file()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kept_checkpoints(output: Path) -> list[str]:
    return [folder.parent.name for folder in output.glob("checkpoint-*/finetune.json")]


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_driver_resumes_to_the_adapter_of_an_undisturbed_run(
    command, finetune_here, selection, finished, tmp_path
):
    output = tmp_path / "run"
    process = command.start("--data", selection, "--output", output, *SETTINGS)
    wait_for(lambda: kept_checkpoints(output), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # Ray notices that its driver is gone, and ends the workers
    finetune_here.run("--resume", output)
    assert metrics(output).keys() == metrics(finished[0]).keys()
    resumed, undisturbed = last_adapter(output), last_adapter(finished[0])
    for name, tensor in undisturbed.items():
        assert (resumed[name] == tensor).all(), name


def test_a_lost_worker_of_two_is_replaced_and_the_loss_is_the_same(command, selection, tmp_path):
    # Without dropout, whose random numbers differ from worker to worker, one worker's run is what
    # two undisturbed ones do; test_finetune_workers.py has that.
    settings = (*SETTINGS, "training.lora.lora_dropout=0")
    output = tmp_path / "disturbed"
    process = command.start(
        "--data", selection, "--num-workers", "2", *settings, "--output", output
    )
    wait_for(lambda: kept_checkpoints(output), process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[1].kill()
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    assert printed.count(f"step {NUM_STEPS} of {NUM_STEPS}") == 1
    alone = train_alone(load_config(FinetuneConfig, settings), selection, tmp_path / "alone")
    loss = metrics(output)[NUM_STEPS]["loss"]
    assert loss == pytest.approx(metrics(alone)[NUM_STEPS]["loss"], abs=1e-4)


def train_alone(config: FinetuneConfig, selection: Path, output: Path) -> Path:
    """The same in this process, without Ray."""
    dataset = dataclasses.replace(config.dataset, data_path=str(selection))
    config = dataclasses.replace(config, dataset=dataset)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    prepare_supervised_rows(config, tokenizer, output)
    finetune(config, tokenizer, TrainingWorker(output=output, scratch=output))
    return output


def test_a_run_of_another_configuration_is_refused(complaint, selection, finished):
    line = complaint(
        main, "--data", selection, "--output", finished[0], *SETTINGS, "training.lora.r=8"
    )
    assert "training.lora.r is 4 there and 8 here" in line
    line = complaint(main, "--resume", finished[0], "training.learning_rate=1")
    assert "training.learning_rate is 0.001 there and 1.0 here" in line


def test_more_workers_than_the_cluster_has_are_refused(finetune_here, selection, tmp_path):
    line = finetune_here.refuse(
        "--data", selection, "--output", tmp_path / "run", *SETTINGS, "--num-workers", "512",
        "training.effective_batch_size=1024",
    )  # fmt: skip
    assert "scaling.num_workers must be at most" in line


def test_too_little_memory_is_said_with_numbers(selection, tmp_path):
    # In this process: what a worker says reaches the driver as in test_pretrain_command.py.
    size = 1_000_000_000
    batch = (f"training.effective_batch_size={size}", f"training.batch_size={size}")
    config = load_config(FinetuneConfig, (*SETTINGS, *batch))
    message = "finetuning needs at least .* lower training.batch_size"
    with pytest.raises(SelectMoeError, match=message):
        train_alone(config, selection, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "model folder nowhere does not exist"),
        (("--data", "nowhere.jsonl"), "no such file or folder"),
        (("--data", "empty/selected_data.jsonl"), "the selection is empty"),
        (("--data", "questions.jsonl"), "must have an assistant turn"),
        (("--resume", "nowhere"), "no run to resume"),
        (("dataset.mode=random",), "dataset.fraction must be set"),
        (("training.lora.rank=3",), "did you mean 'training.lora.r'?"),
        (("training.lora.target_modules=query",), "got 'query'"),
        (("--num-workers", "3"), "training.effective_batch_size must be a multiple of"),
    ],
)
def test_a_mistake_is_one_line(complaint, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "selected_data.jsonl").touch()
    question = {"messages": [{"role": "user", "content": "why?"}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    assert message in complaint(main, *arguments, "--output", "run")


def test_help_answers_within_a_second(command):
    assert "training.lora.r=128" in command.run("--help")
    assert command.cpu_seconds_of_help() < 1
