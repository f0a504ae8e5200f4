"""The topology of cluster.yaml on one machine: a head without CPUs, and workers that the autoscaler
starts when a job asks for them. Ray's fake provider starts a worker as processes, not a machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ray_head import free_port, ray_head

pytestmark = pytest.mark.timeout(300)


def faked(cluster: dict, *, head_address: str) -> dict:
    """cluster.yaml's node types and limits, with a CPU where a real worker has a GPU."""
    head, workers = cluster["head_node_type"], dict(cluster["available_node_types"])
    del workers[head]
    types = {
        name: {
            "resources": {"CPU": 1},
            "node_config": {},
            "min_workers": worker["min_workers"],
            "max_workers": worker["max_workers"],
        }
        for name, worker in workers.items()
    }
    # The fake provider calls the type of its head so.
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    kept = ("cluster_name", "max_workers", "upscaling_speed", "idle_timeout_minutes")
    return {
        **{key: cluster[key] for key in kept},
        "provider": {"type": "fake_multinode", "gcs_address": head_address},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
    }


@pytest.fixture(scope="module")
def head(repository, tmp_path_factory):
    """The environment of a job on the head of such a cluster."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
    cluster = yaml.safe_load((repository / "cluster.yaml").read_text("utf-8"))
    file = folder / "cluster.json"
    file.write_text(json.dumps(faked(cluster, head_address=address)), "utf-8")
    options = ("--num-cpus=0", f"--autoscaling-config={file}", "--include-dashboard=false")
    fake = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(folder, *options, port=port, environment=fake):
        yield {**os.environ, "RAY_ADDRESS": address}


def run(environment: dict, folder: Path, script: Path, *arguments: str | Path) -> str:
    finished = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def test_two_workers_warm_up_and_score_where_only_one_was_running(
    head, repository, corpus, tmp_path
):
    jobs = repository / "jobs"
    printed = run(
        head, tmp_path, jobs / "pretrain.py", "--output", tmp_path / "warm", "--num-workers", "2",
        "scaling.wait_for_nodes=true", "dataset.subset_ratio=0.2", "max_rejected=1",
        "dataset.max_sequence_length=128", "training.num_steps=4", "training.batch_size=4",
    )  # fmt: skip
    assert "step 4 of 4: loss" in printed
    manifest = json.loads((tmp_path / "warm" / "manifest.json").read_text("utf-8"))
    assert manifest["num_steps"] == 4
    printed = run(
        head, tmp_path, jobs / "select.py", "--pct", "0.2", "--data", corpus, "--num-actors", "2",
        "--output", tmp_path / "run", "rows_per_shard=15",
        f"model_checkpoint_path={tmp_path / 'warm'}",
    )  # fmt: skip
    assert "2 CPUs, 0 GPUs on 3 node(s)" in printed
    lines = (tmp_path / "run" / "scored" / "_finished.jsonl").read_text("utf-8").splitlines()
    assert len({json.loads(line)["process_id"] for line in lines}) == 2
    assert len((tmp_path / "run" / "selected_data.jsonl").read_text("utf-8").splitlines()) == 24
