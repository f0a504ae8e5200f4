"""What the integration tests share: the command as a user runs it, a corpus, a finished run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from selectmoe.cli.command_line import one_line
from selectmoe.errors import SelectMoeError
from selectmoe.paths import DEMO_CORPUS
from tests.chromium import chromium
from tests.command_here import CommandHere
from tests.job import Job, without_report
from tests.ray_head import free_port, ray_head


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="session")
def head(repository, tmp_path_factory) -> Iterator[str]:
    """The address of a Ray head with two CPUs, one for all tests of this process."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    options = ("--include-dashboard=false", "--num-cpus=2")
    folder = tmp_path_factory.mktemp("head")
    with ray_head(folder, *options, port=port, environment=environment):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def shared_ray(head, monkeypatch) -> str:
    """Processes of this test connect to the shared head."""
    monkeypatch.setenv("RAY_ADDRESS", head)
    return head


@pytest.fixture
def command_here(head, tmp_path):
    """command_here("finetune"): that command in this process, on the shared head."""
    return lambda name: CommandHere(tmp_path, name, ray_address=head)


@pytest.fixture
def make_job(repository, tmp_path):
    """make_job("finetune"): that command as a process, in a folder of the test's own. It starts a
    Ray of its own unless the test takes `shared_ray` too."""
    return lambda name: Job(repository, tmp_path, name)


@pytest.fixture
def job(make_job):
    return make_job("select")


@pytest.fixture
def select_here(command_here):
    return command_here("select")


@pytest.fixture
def selectmoe(repository, tmp_path):
    """selectmoe("select"): `python -m selectmoe select` in another folder; returns status, standard
    output and error."""

    def run(*arguments: object, script: str = "") -> tuple[int, str, str]:
        program = ["-c", script] if script else ["-m", "selectmoe"]
        words = [str(argument) for argument in arguments]
        if words:
            words[1:] = without_report(words[0], words[1:])
        process = subprocess.run(
            [sys.executable, *program, *words],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        return process.returncode, process.stdout, process.stderr

    return run


@pytest.fixture
def complaint(tmp_path, monkeypatch):
    """complaint(main, *arguments): the line that a command ends with, for a mistake it sees before
    Ray starts. In this process, which has torch loaded already; `Job.refuse` tries the rest."""

    def complain(main, *arguments: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SelectMoeError) as caught:
            main([str(argument) for argument in arguments])
        assert not ray.is_initialized()
        return one_line(caught.value)

    return complain


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """120 rows of the demo corpus, of every kind."""
    lines = DEMO_CORPUS.read_text("utf-8").splitlines()[::5]
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture(scope="session")
def finished(repository, corpus, tmp_path_factory):
    """A run of 8 shards on one actor, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output = folder / "run"
    printed = Job(repository, folder).run(
        "--pct", "0.2", "--data", corpus, "--output", output, "--num-actors", "1",
        "rows_per_shard=15", "report=tokens",
    )  # fmt: skip
    return output, printed
