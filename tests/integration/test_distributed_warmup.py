"""Two workers of a warm-up, without Ray: they end where one worker with the same steps does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer
from tests.tiny_target import save_tiny_llama
from tests.warmup_run import warm_up

pytestmark = pytest.mark.timeout(180)

# 5 pairs a step: two workers have unequal shares, and, at 300 tokens, unequal numbers of batches.
SETTINGS = {
    "dataset.subset_ratio": 0.2, "dataset.max_sequence_length": 96, "max_rejected": 1.0,
    "training.num_steps": 4, "training.effective_batch_size": 5,
    "training.max_tokens_per_batch": 300, "training.logging_steps": 2,
}  # fmt: skip


def run_two(repository: Path, runs: dict[Path, dict[str, object]]) -> list[str]:
    """What each of two processes printed that did all `runs`: settings by folder. The processes do
    all of them, since importing torch takes longer than a run."""
    settings = {
        str(folder): {**SETTINGS, "scaling.num_workers": 2, **changes}
        for folder, changes in runs.items()
    }
    for folder, values in settings.items():
        config = from_values(WarmupConfig, values)
        prepare_warmup_rows(config, warmup_tokenizer(config), Path(folder))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, repository / "tests" / "warmup_worker.py", str(rank), "2", port,
             json.dumps(settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


def run_one(output: Path, **settings: object) -> None:
    worker = TrainingWorker(output=output, scratch=output / "scratch")
    warm_up(from_values(WarmupConfig, {**SETTINGS, **settings}), worker)


def gates(train_moe_gates: bool) -> dict[str, object]:
    return {"training.train_moe_gates": train_moe_gates, "training.learning_rate": 1e-3}


def save_broken_model(folder: Path) -> None:
    """NaN for a token of some samples, not of all: only the worker that has one of them sees it."""
    model = SelectMoeForCausalLM.from_pretrained(EMBEDDED_SELECTOR)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)
    [token] = tokenizer.encode("?", add_special_tokens=False)
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(repository, tmp_path_factory):
    """A folder with a run of one worker and runs of two, whose strategies share the one; and what
    each of the two printed, in the last run of a model with a broken token."""
    folder = tmp_path_factory.mktemp("finished")
    for both in (False, True):
        run_one(folder / f"one-{both}", **gates(both))
    two = {
        folder / f"{strategy}-{both}": {**gates(both), "training.strategy": strategy}
        for strategy in ("ddp", "fsdp")
        for both in (False, True)
    }
    base = str(save_tiny_llama(folder / "base", num_hidden_layers=3))
    on_base = {"model": base, "training.method": "steps", "training.layers": "0,1"}
    run_one(folder / "one-base", **on_base)
    for strategy in ("ddp", "fsdp"):
        two[folder / f"{strategy}-base"] = {**on_base, "training.strategy": strategy}
    save_broken_model(folder / "broken")
    broken = {folder / "run-of-broken": {"model": str(folder / "broken")}}
    return folder, run_two(repository, two | broken)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("train_moe_gates", [False, True])
def test_two_workers_end_with_the_gates_of_one(finished, strategy, train_moe_gates):
    folder, _ = finished
    folders = [folder / f"{name}-{train_moe_gates}" for name in ("one", strategy)]
    one, two = (load_file(folder / "full_rank_weights.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Ten thousand times what was seen (1e-8), and a hundredth of what training moves them by.
        assert (two[name] - tensor).abs().max() < 1e-5, name
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss", "label_loss", "good_probability", "margin_spread", "pairs_in_order"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_on_a_base_end_with_the_gates_of_one(finished, strategy):
    folder, _ = finished
    one, two = (
        load_file(folder / f"{name}-base" / "gates.safetensors") for name in ("one", strategy)
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() < 1e-5, name
    assert max(tensor.abs().max() for tensor in one.values()) > 1e-3  # they have moved from zero


def test_a_bad_batch_of_one_worker_stops_both_in_the_same_words(finished):
    _, printed = finished
    lines = {line for text in printed for line in text.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1
    assert "is not a finite number, in the batch of the samples 'demo-" in lines.pop()
