"""The topology of cluster.yaml on one machine: a head without CPUs, and workers that join while a
job waits for them. Each node is a raylet of its own; a CPU stands where a real worker has a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from ray.cluster_utils import Cluster

from selectmoe.paths import DEMO_CORPUS
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


@pytest.fixture
def long_corpus(tmp_path) -> Path:
    """The demo corpus four times: twenty seconds for one actor, where duplicates are kept."""
    rows = [json.loads(line) for line in DEMO_CORPUS.read_text("utf-8").splitlines()]
    file = tmp_path / "corpus.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for copy in range(4):
            for row in rows:
                stream.write(json.dumps(row | {"id": f"{row['id']}-{copy}"}) + "\n")
    return file


def finished_lines(output: Path) -> list[dict]:
    file = output / "scored" / "_finished.jsonl"
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_a_node_that_joins_while_a_run_scores_gets_an_actor(
    cluster, repository, long_corpus, tmp_path
):
    output = tmp_path / "run"
    process = start(
        cluster, tmp_path, repository / "jobs" / "select.py", "--data", long_corpus,
        "--output", output, "rows_per_shard=16", "selection.duplicates=keep",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list((output / "scored").glob("shard-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    node = cluster.add_node(num_cpus=1)
    printed = finish(process)
    assert "on 1 actor" in printed
    lines = finished_lines(output)
    assert len({line["process_id"] for line in lines}) == 2
    assert len({line["shard"] for line in lines}) == len(lines)  # no shard twice
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    assert (manifest["scoring"]["device"], manifest["scoring"]["dtype"]) == ("cpu", "float32")
    cluster.remove_node(node)


def test_two_workers_warm_up_where_only_one_was_running(cluster, repository, tmp_path):
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
    assert (manifest["device"], manifest["dtype"]) == ("cpu", "float32")


def test_a_gpu_that_torch_cannot_use_ends_a_run_before_its_corpus_is_read(
    cluster, corpus, tmp_path, monkeypatch
):
    """Ray believes what a node says of its GPUs; here there is none."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU that torch can use")
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    for command, output in (("select", tmp_path / "run"), ("pretrain", tmp_path / "warm")):
        here = CommandHere(tmp_path, command)
        line = here.refuse("--data", corpus, "--output", output)
        assert "is reserved, and torch cannot use it" in line
        assert not (output / "corpus").exists()
        assert not (output / "tokenized").exists()
    cluster.remove_node(node)
