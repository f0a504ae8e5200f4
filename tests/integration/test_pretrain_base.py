"""jobs/pretrain.py on a base: Ray workers compute features, and the run gives a selector folder."""

import json
import os
import signal
import time

import pytest
from safetensors.torch import load_file

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.scoring.calibration import describe
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.base_stage import run_base_warmup
from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_target import save_tiny_llama

pytestmark = pytest.mark.timeout(300)

SETTINGS = {
    "dataset.subset_ratio": 0.6, "dataset.max_sequence_length": 128, "max_rejected": 1.0,
    "training.num_copies": 2, "training.penalty": 0.1,
    "training.max_tokens_per_batch": 128,  # a row each: a run takes seconds, in which it is killed
}  # fmt: skip
OVERRIDES = [f"{key}={value}" for key, value in SETTINGS.items()]
GATES = "gates.safetensors"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "dense": save_tiny_llama(folder / "dense", num_hidden_layers=4),
        "experts": save_tiny_olmoe(folder / "experts", num_hidden_layers=4),
    }


def undisturbed(base, folder):
    """The gates of the same run in one process, without Ray."""
    config = from_values(WarmupConfig, {**SETTINGS, "model": str(base)})
    prepare_warmup_rows(config, warmup_tokenizer(config), folder)
    run_base_warmup(config, TrainingWorker(output=folder, scratch=folder))
    return load_file(folder / GATES)


def require_same(gates, expected) -> None:
    assert gates.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (gates[name] - tensor).abs().max() < 1e-4, name


def test_a_killed_run_is_resumed_to_the_same_gates(make_job, command_here, bases, tmp_path):
    output = tmp_path / "run"
    process = make_job("pretrain").start("--model", bases["dense"], "--output", output, *OVERRIDES)
    deadline = time.monotonic() + 200
    while not (shards := list((output / "features").glob("0*.safetensors"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # Ray notices that its driver is gone, and ends the worker
    written = {shard: shard.stat().st_mtime_ns for shard in shards}
    printed = command_here("pretrain").run("--resume", output)
    assert {shard: shard.stat().st_mtime_ns for shard in written} == written
    require_same(load_file(output / GATES), undisturbed(bases["dense"], tmp_path / "other"))
    assert f"weights  {output / GATES}" in printed


def test_two_workers_on_experts_give_the_gates_of_one_and_stage_2_takes_the_folder(
    command_here, bases, tmp_path
):
    output = tmp_path / "run"
    printed = command_here("pretrain").run(
        "--model", bases["experts"], "--output", output, "--num-workers", "2", *OVERRIDES
    )
    require_same(load_file(output / GATES), undisturbed(bases["experts"], tmp_path / "other"))
    assert "rows with their copies" in printed
    assert "of held-out rows against corrupted copies" in printed
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    engine = ScoringEngine.from_pretrained(
        str(bases["experts"]), model_checkpoint_path=str(output), device="cpu"
    )
    assert manifest["calibration"] == describe(engine.calibration)
    assert manifest["layers"] == list(range(manifest["layers"][0], manifest["layers"][-1] + 1))
