"""What the integration tests share: the command as a user runs it, a corpus, a finished run."""

import subprocess
import sys
from pathlib import Path

import pytest

from selectmoe.paths import DEMO_CORPUS


class Job:
    """Runs `python jobs/select.py` from another folder than the checkout."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.command = [sys.executable, str(repository / "jobs" / "select.py")]
        self.folder = folder

    def start(self, *arguments: str | Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str | Path) -> str:
        process = self.start(*arguments)
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == 0, printed
        return printed

    def refuse(self, *arguments: str | Path) -> str:
        """What a run prints that ends with a mistake: one line, status 2."""
        process = self.start(*arguments)
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == 2, printed
        assert "Traceback" not in printed
        return [line for line in printed.splitlines() if line.startswith("error: ")][-1]


@pytest.fixture
def job(repository, tmp_path):
    return Job(repository, tmp_path)


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
