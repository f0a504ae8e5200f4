"""Finetuning on two processes with gloo, as Ray's workers do it, but without Ray."""

import dataclasses
import os
import socket
import subprocess
import sys

import pytest

from selectmoe.config.loading import resolved
from selectmoe.finetune.supervised_data import prepare_rows
from tests.finetune_run import LORA, Run, assert_same, spoiled
from tests.tiny_olmoe import tiny_tokenizer
from tests.tiny_target import save_tiny_llama

pytestmark = pytest.mark.timeout(120)

WORKER = """
import sys
from pathlib import Path
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.loading import load_config
from selectmoe.finetune.stage import TrainingPlace, finetune
from selectmoe.finetune.supervised_data import SupervisedRows, load_target_tokenizer
rank, output, checkpoints, *overrides = sys.argv[1:]
config = load_config(FinetuneConfig, overrides)
place = TrainingPlace(checkpoints=Path(checkpoints), num_workers=2)
try:
    finetune(
        config, SupervisedRows(Path(output, "tokenized")), load_target_tokenizer(config),
        place, output=Path(output),
    )
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def train_on_two_workers(run: Run) -> list[tuple[int, str]]:
    """Status and last line of each process."""
    prepare_rows(run.config, tiny_tokenizer(), run.output / "tokenized")
    overrides = [
        f"{key}={'null' if value is None else value}".replace("'", "")
        for key, value in resolved(run.config).items()
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        folder = run.output if rank == 0 else run.output / "of-rank-1"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), run.output, folder, *overrides],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    printed = [process.communicate(timeout=110)[0] for process in processes]
    lines = [(text.strip().splitlines() or [""])[-1] for text in printed]
    return [(p.returncode, line) for p, line in zip(processes, lines, strict=True)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("target") / "llama")


def test_two_workers_end_with_the_adapter_of_one(llama, tmp_path):
    lora = dataclasses.replace(LORA, lora_dropout=0.0)
    one, two = (Run(tmp_path / name, llama, batch_size=2, lora=lora, num_epochs=1) for name in "12")
    one.train()
    assert train_on_two_workers(two) == [(0, ""), (0, "")]
    # As above: another order of sums.
    assert_same(one.adapter("checkpoint-5"), two.adapter("checkpoint-5"), atol=2e-4)
    losses = [[line["loss"] for line in run.metrics()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_loss_that_is_no_number_on_one_worker_stops_both(llama, tmp_path):
    run = Run(tmp_path, spoiled(llama, tmp_path), batch_size=1)
    outcomes = train_on_two_workers(run)
    assert [status for status, _ in outcomes] == [3, 3]
    assert all("TrainingStoppedError" in line and "rows 'row-7'" in line for _, line in outcomes)
