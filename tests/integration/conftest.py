"""What the integration tests share: the command as a user runs it, a corpus, a finished run."""

from pathlib import Path

import pytest
import ray

from selectmoe.cli.command_line import one_line
from selectmoe.errors import SelectMoeError
from selectmoe.paths import DEMO_CORPUS
from tests.job import Job


@pytest.fixture
def make_job(repository, tmp_path):
    """make_job("finetune"): that command, in a folder of the test's own."""
    return lambda name: Job(repository, tmp_path, name)


@pytest.fixture
def job(make_job):
    return make_job("select")


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
        "rows_per_shard=15",
    )  # fmt: skip
    return output, printed
