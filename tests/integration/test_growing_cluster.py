"""The topology of cluster.yaml on one machine: a head without CPUs, and workers that join while a
job waits for them. Each node is a raylet of its own; a CPU stands where a real worker has a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster

from tests.command_here import CommandHere

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(repository):
    """The head and as many workers as cluster.yaml has from the start."""
    settings = yaml.safe_load((repository / "cluster.yaml").read_text("utf-8"))
    types = settings["available_node_types"]
    head = types.pop(settings["head_node_type"])
    cluster = Cluster(head_node_args={"num_cpus": head["resources"]["CPU"]}, initialize_head=True)
    for worker in types.values():
        for _ in range(worker["min_workers"]):
            cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def start(cluster: Cluster, folder: Path, script: Path, *arguments: str | Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=folder, env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


def test_two_workers_warm_up_and_score_where_only_one_was_running(
    cluster, repository, corpus, tmp_path, monkeypatch
):
    process = start(
        cluster, tmp_path, repository / "jobs" / "pretrain.py", "--output", tmp_path / "warm",
        "--num-workers", "2", "scaling.wait_for_nodes=true", "dataset.subset_ratio=0.2",
        "max_rejected=1", "dataset.max_sequence_length=128", "training.num_steps=4",
        "training.effective_batch_size=4",
    )  # fmt: skip
    assert process.stdout is not None
    line = ""
    while "training on 2 worker(s)" not in line:
        line = process.stdout.readline()
        assert line
    time.sleep(2)  # it waits
    assert not (tmp_path / "warm" / "metrics.jsonl").exists()
    cluster.add_node(num_cpus=1)
    assert "step 4 of 4: loss" in finish(process)
    manifest = json.loads((tmp_path / "warm" / "manifest.json").read_text("utf-8"))
    assert manifest["num_steps"] == 4

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    printed = CommandHere(tmp_path).run(
        "--pct", "0.2", "--data", corpus, "--num-actors", "2", "--output", tmp_path / "run",
        "rows_per_shard=15", f"model_checkpoint_path={tmp_path / 'warm'}",
    )  # fmt: skip
    assert "2 CPUs, 0 GPUs on 3 node(s)" in printed
    lines = (tmp_path / "run" / "scored" / "_finished.jsonl").read_text("utf-8").splitlines()
    assert len({json.loads(line)["process_id"] for line in lines}) == 2
    assert len((tmp_path / "run" / "selected_data.jsonl").read_text("utf-8").splitlines()) == 24
