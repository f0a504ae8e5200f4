"""The lock of a run, between processes as between two commands of a user."""

import os
import signal
import subprocess
import sys

import pytest

from selectmoe.cli import run_lock
from selectmoe.cli.run_lock import locked
from selectmoe.errors import ResumeError


@pytest.fixture
def holder(tmp_path, repository):
    """A process that holds the lock of the folder, and imports nothing else."""
    program = (
        "import sys, pathlib\n"
        "from selectmoe.cli.run_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=repository,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_with_the_process_of_the_first(tmp_path, holder):
    with pytest.raises(ResumeError) as refused, locked(tmp_path):
        pass
    host = os.uname().nodename
    assert str(refused.value) == (
        f"{tmp_path}: this run is running: process {holder.pid} on {host}; wait until it ends, or "
        "stop it"
    )
    holder.communicate()  # it ends by itself
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_run_holds_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / run_lock.LOCK_NAME).exists()
    with locked(tmp_path):
        pass


def test_a_process_that_was_started_by_the_run_does_not_keep_its_lock(tmp_path):
    with locked(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with locked(tmp_path):
            pass
    finally:
        child.communicate(b"\n")
