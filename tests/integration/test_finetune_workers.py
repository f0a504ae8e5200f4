"""Finetuning on two processes with gloo, as Ray's workers do it, but without Ray."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
for output, checkpoints, overrides, resume_from in json.loads(sys.argv[1]):
    config = load_config(FinetuneConfig, overrides)
    worker = TrainingWorker(
        output=Path(output), scratch=Path(checkpoints), num_workers=2, resume_from=resume_from
    )
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


def train_on_two_workers(runs: dict[Run, Path | None]) -> list[tuple[str, ...]]:
    """What each process printed as the outcome of each run. runs: with the checkpoint that a run
    resumes from."""
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
        for run, checkpoint in runs.items():
            folder = run.output / "of-rank-1" if rank else run.output
            resume_from = str(checkpoint) if checkpoint else None
            settings.append((str(run.output), str(folder), overrides_of(run), resume_from))
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
    """A run of one worker, the same on two, that resumed from its second step, and the outcomes of
    these and of one that is spoiled."""
    folder = tmp_path_factory.mktemp("runs")
    lora = dataclasses.replace(LORA, lora_dropout=0.0)
    settings = {"batch_size": 2, "lora": lora, "num_epochs": 1, "save_steps": 2}
    one, two, resumed = (Run(folder / name, llama, **settings) for name in "123")
    resumed.config = dataclasses.replace(resumed.config, dataset=two.config.dataset)
    one.train()
    sharded = Run(
        folder / "fsdp", llama, batch_size=2, lora=lora, num_epochs=1, strategy="fsdp",
        gradient_checkpointing=True,
    )  # fmt: skip
    last = Run(folder, spoiled(llama, folder), batch_size=1)
    checkpoint = two.output / "checkpoint-2"
    runs: dict[Run, object] = {two: None, resumed: checkpoint, sharded: None, last: None}
    return one, (two, resumed, sharded), train_on_two_workers(runs)


def test_two_workers_end_with_the_adapter_of_one_also_resumed_or_sharded(trained):
    one, runs, outcomes = trained
    for run, outcome in zip(runs, outcomes, strict=False):
        assert outcome == ("outcome: done", "outcome: done")
        # As above: another order of sums.
        assert_same(one.adapter("checkpoint-5"), run.adapter("checkpoint-5"), atol=2e-4)
        losses = {line["step"]: line["loss"] for line in one.metrics()}
        for line in run.metrics():
            assert line["loss"] == pytest.approx(losses[line["step"]], abs=1e-4)
    assert [run.metrics()[0]["step"] for run in runs] == [1, 3, 1]


def test_a_loss_that_is_no_number_on_one_worker_stops_both(trained):
    *_, outcomes = trained
    for line in outcomes[-1]:
        assert "TrainingStoppedError" in line
        assert "rows 'row-7'" in line
