"""Finetuning on two processes with gloo, as Ray's workers do it, but without Ray."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from selectmoe.config.loading import resolved
from selectmoe.finetune.supervised_data import prepare_supervised_rows
from tests.finetune_run import LORA, Run, assert_same, spoiled
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_target import save_tiny_llama

pytestmark = pytest.mark.timeout(240)

# One process does all runs, since importing torch takes it longer than a run.
WORKER = """
import json
import sys
from pathlib import Path
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.finetune.stage import finetune
from selectmoe.finetune.supervised_data import load_target_tokenizer
from selectmoe.training.worker import TrainingWorker
for output, checkpoints, overrides in json.loads(sys.argv[1]):
    config = load_config(FinetuneConfig, overrides)
    worker = TrainingWorker(output=Path(output), scratch=Path(checkpoints), num_workers=2)
    try:
        finetune(config, load_target_tokenizer(config), worker)
        print("outcome: done")
    except Exception as error:
        print("outcome:", type(error).__name__, error)
"""


def overrides_of(run: Run) -> list[str]:
    return [
        f"{key}={'null' if value is None else value}".replace("'", "")
        for key, value in resolved(run.config).items()
    ]


def train_on_two_workers(*runs: Run) -> list[tuple[str, ...]]:
    """What each process printed as the outcome of each run."""
    for run in runs:
        prepare_supervised_rows(run.config, tiny_tokenizer(), run.output)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        # Rank 0 keeps the checkpoints.
        settings = []
        for run in runs:
            folder = run.output / "of-rank-1" if rank else run.output
            settings.append((str(run.output), str(folder), overrides_of(run)))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, json.dumps(settings)],
                env=environment, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    outcomes = [
        [line for line in text.splitlines() if line.startswith("outcome: ")] for text in printed
    ]
    return list(zip(*outcomes, strict=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """A run of one worker, the same on two, and the outcomes of that and of one that is spoiled."""
    folder = tmp_path_factory.mktemp("runs")
    lora = dataclasses.replace(LORA, lora_dropout=0.0)
    one, two = (Run(folder / name, llama, batch_size=2, lora=lora, num_epochs=1) for name in "12")
    one.train()
    sharded = Run(
        folder / "fsdp", llama, batch_size=2, lora=lora, num_epochs=1, strategy="fsdp",
        gradient_checkpointing=True,
    )  # fmt: skip
    last = Run(folder, spoiled(llama, folder), batch_size=1)
    return one, (two, sharded), train_on_two_workers(two, sharded, last)


@pytest.mark.parametrize("number", [0, 1], ids=["ddp", "fsdp"])
def test_two_workers_end_with_the_adapter_of_one(trained, number):
    one, several, outcomes = trained
    two = several[number]
    assert outcomes[number] == ("outcome: done", "outcome: done")
    # As above: another order of sums.
    assert_same(one.adapter("checkpoint-5"), two.adapter("checkpoint-5"), atol=2e-4)
    losses = [[line["loss"] for line in run.metrics()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_loss_that_is_no_number_on_one_worker_stops_both(trained):
    *_, outcomes = trained
    for line in outcomes[2]:
        assert "TrainingStoppedError" in line
        assert "rows 'row-7'" in line
