"""jobs/finetune.py as a user runs it: a real local Ray, lost workers, resumption, mistakes."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

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
from tests.command_here import CommandHere
from tests.job import Job
from tests.training_workers import training_workers

pytestmark = pytest.mark.timeout(500)  # three runs on Ray are one fixture

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
def undisturbed(selection, tmp_path_factory):
    """The same run in this process, without Ray."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(load_config(FinetuneConfig, SETTINGS), selection, output)
    return output


def train_here(config: FinetuneConfig, selection: Path, output: Path) -> None:
    dataset = dataclasses.replace(config.dataset, data_path=str(selection))
    config = dataclasses.replace(config, dataset=dataset)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    prepare_supervised_rows(config, tokenizer, output)
    finetune(config, tokenizer, TrainingWorker(output=output, scratch=output))


def last_adapter(output: Path) -> dict:
    return load_file(output / f"checkpoint-{NUM_STEPS}" / "adapter_model.safetensors")


def metrics(output: Path) -> dict[int, dict]:
    """By step; of a step that was computed twice the last line."""
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def wait_for_checkpoint(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not list(output.glob(f"checkpoint-{step}/finetune.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def resumed(repository, head, selection, tmp_path_factory):
    """A run whose worker is killed, and whose driver is, when a new worker has gone on; what was
    printed when it was resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    output = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head)
        process = Job(repository, folder, "finetune").start(
            "--data", selection, "--output", output, "--merge", *SETTINGS
        )
    wait_for_checkpoint(output, 3, process)
    [worker] = training_workers()
    worker.kill()
    wait_for_checkpoint(output, 9, process)
    assert worker not in training_workers()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "manifest.json").exists()
    time.sleep(3)  # Ray notices that its driver is gone, and ends the workers
    return output, CommandHere(folder, "finetune", ray_address=head).run("--resume", output)


def test_a_lost_worker_and_a_killed_driver_leave_the_adapter_of_an_undisturbed_run(
    resumed, undisturbed
):
    output, _ = resumed
    assert metrics(output).keys() == metrics(undisturbed).keys()
    adapter, expected = last_adapter(output), last_adapter(undisturbed)
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (adapter[name] == tensor).all(), name


def test_a_run_ends_with_an_adapter_its_metrics_and_a_manifest(resumed):
    output, printed = resumed
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


def test_a_run_of_another_configuration_is_refused(complaint, selection, resumed):
    output, _ = resumed
    line = complaint(main, "--data", selection, "--output", output, *SETTINGS, "training.lora.r=8")
    assert "training.lora.r is 4 there and 8 here" in line
    line = complaint(main, "--resume", output, "training.learning_rate=1")
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
        train_here(config, selection, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "model folder nowhere does not exist"),
        (("--data", "nowhere.jsonl"), "no such file or folder"),
        (("--data", "empty/selected_data.jsonl"), "the selection is empty"),
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
    assert message in complaint(main, *arguments, "--output", "run")


def test_rows_from_which_nothing_can_be_learned_are_one_line(finetune_here, tmp_path):
    question = {"messages": [{"role": "user", "content": "why?"}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    line = finetune_here.refuse("--data", "questions.jsonl", "--output", "run")
    assert "must have an assistant turn" in line


def test_help_answers_within_a_second(command):
    assert "training.lora.r=128" in command.run("--help")
    assert command.cpu_seconds_of_help() < 1
