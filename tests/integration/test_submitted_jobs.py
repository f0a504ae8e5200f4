"""jobs/select.py on a Ray cluster: a head of our own, and jobs submitted to it as a user would."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from selectmoe.cli.select_command import main
from tests.ray_head import free_port, ray_head

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkout(repository, tmp_path_factory):
    """A copy of what a user has: the tracked files, where a head may leave its own."""
    folder = tmp_path_factory.mktemp("checkout") / "select-moe"
    listed = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others",
              "--exclude-standard", "selectmoe", "jobs", ".gitignore"]  # fmt: skip
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (repository / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def cluster(checkout, tmp_path_factory):
    """A Ray head with two CPUs, started in the checkout; gives the environment to submit with."""
    home = tmp_path_factory.mktemp("home")
    # A Ray folder of its own: `ray job submit` finds the cluster of a job by the note that the head
    # leaves there, else takes any head that runs on this machine.
    ray_folder = tempfile.mkdtemp(prefix="smt-")  # short, since paths of sockets are
    environment = {
        **os.environ,
        "RAY_TMPDIR": ray_folder,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port, dashboard_port = free_port(), free_port()
    options = ("--num-cpus=2", f"--dashboard-port={dashboard_port}")
    with ray_head(checkout, *options, port=port, environment=environment):
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
    shutil.rmtree(ray_folder, ignore_errors=True)


def submit(environment: dict[str, str], folder: Path, *arguments: str | Path) -> tuple[int, str]:
    """Status and output of `ray job submit` in `folder`, colours taken off."""
    finished = subprocess.run(
        ["ray", "job", "submit", *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return finished.returncode, re.sub(r"\x1b\[\d+m", "", finished.stdout + finished.stderr)


def selected(output: Path) -> bytes:
    return (output / "selected_data.jsonl").read_bytes()


def test_a_job_with_an_uploaded_folder_gives_the_bytes_of_a_local_run(
    cluster, checkout, corpus, tmp_path
):
    status, printed = submit(
        cluster, checkout, "--working-dir", ".", "--",
        "python", "jobs/select.py", "--pct", "0.2", "--data", corpus, "--num-actors", "2",
        "rows_per_shard=15",
    )  # fmt: skip
    assert status == 0, printed
    [output] = (Path(cluster["HOME"]) / "selectmoe_outputs").glob("stage_2_selection/*/*")
    assert str(output) in printed
    main(
        ["--pct", "0.2", "--data", str(corpus), "--output", str(tmp_path / "local"),
         "rows_per_shard=15"]
    )  # fmt: skip
    assert selected(output) == selected(tmp_path / "local")


def test_the_literal_command_works_where_the_head_was_started_in_the_checkout(cluster, checkout):
    status, printed = submit(
        cluster, checkout.parent, "--", "python", "jobs/select.py", "--pct", "0.05"
    )
    assert status == 0, printed
    [output] = (checkout / "outputs").glob("stage_2_selection/*/*")
    counts = json.loads((output / "manifest.json").read_text("utf-8"))["total"]
    assert counts["num_selected"] == counts["num_read"] // 20


def test_four_submitted_stages_find_what_the_one_before_left(cluster, checkout, tmp_path):
    def run(name: str, *arguments: str | Path) -> str:
        status, printed = submit(
            cluster, checkout, "--working-dir", ".", "--", "python", f"jobs/{name}.py", *arguments
        )
        assert status == 0, printed
        return printed

    folders = {name: tmp_path / name for name in ("warm", "selection", "adapter", "results")}
    run(
        "pretrain", "--output", folders["warm"], "training.num_steps=6",
        "training.effective_batch_size=8", "dataset.max_sequence_length=128", "max_rejected=0.1",
    )  # fmt: skip
    run(
        "select", "--pct", "0.05", "--output", folders["selection"],
        f"model_checkpoint_path={folders['warm']}",
    )  # fmt: skip
    run(
        "finetune", "--data", folders["selection"], "--output", folders["adapter"],
        "preset=tiny", "dataset.mode=random", "training.num_epochs=1",
        "dataset.max_sequence_length=256",
    )  # fmt: skip
    printed = run(
        "evaluate", "--adapter", folders["adapter"], "--output", folders["results"], "--limit", "8"
    )
    assert "demo_answer_loss: nll_per_token" in printed
    selection, adapter = (
        json.loads((folders[name] / "manifest.json").read_text("utf-8"))
        for name in ("selection", "adapter")
    )
    assert selection["config"]["model_checkpoint_path"] == str(folders["warm"])
    # The control: as many rows as were selected, of the same corpus, at random.
    assert adapter["data"]["num_read"] == selection["total"]["num_selected"] == 30
    results = json.loads((folders["results"] / "results.json").read_text("utf-8"))
    assert results["adapter"] == adapter["adapter"]


def test_a_relative_path_in_an_uploaded_folder_is_refused_with_the_reason(cluster, checkout):
    status, printed = submit(
        cluster, checkout, "--working-dir", ".", "--",
        "python", "jobs/select.py", "--pct", "0.2", "--data", "corpus.jsonl",
    )  # fmt: skip
    assert status != 0
    assert "error: --data must be an absolute path or a URL under --working-dir" in printed
    assert "Traceback" not in printed


def test_the_upload_leaves_out_environments_and_outputs(cluster, checkout):
    for folder in (".venv", "outputs"):
        (checkout / folder).mkdir(exist_ok=True)
        (checkout / folder / "large.bin").touch()
    script = "import os; print('uploaded', sorted(os.listdir()))"
    status, printed = submit(cluster, checkout, "--working-dir", ".", "--", "python", "-c", script)
    assert status == 0, printed
    [line] = [line for line in printed.splitlines() if line.startswith("uploaded")]
    assert "'jobs'" in line
    assert ".venv" not in line
    assert "outputs" not in line
