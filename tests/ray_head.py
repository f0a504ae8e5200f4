"""A Ray head of the tests' own, by `ray start` as a user would, on free ports."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STARTED = "Ray runtime started"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def ray_head(
    folder: Path, *options: str, port: int, environment: dict[str, str]
) -> Iterator[subprocess.Popen]:
    """`ray start --head` in `folder`; at the end none of its processes is left."""
    ray = Path(sys.executable).with_name("ray")
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={port}", "--disable-usage-stats",
         # A fixed port otherwise, which another head on this machine may have taken.
         f"--dashboard-agent-listen-port={free_port()}", *options],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        printed = ""
        while STARTED not in printed:
            line = process.stdout.readline()
            printed += line
            assert line, printed
        if environment["RAY_TMPDIR"] == os.environ["RAY_TMPDIR"]:
            forget(port)
        yield process
    finally:
        stop(process)


def forget(port: int) -> None:
    """Takes away the note of `ray start`: tests that want this head name its address, and all
    others start a Ray of their own. It is written after the line that tells of the start."""
    note = Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    deadline = time.monotonic() + 30
    while not note.is_file() or not note.read_text("utf-8").endswith(f":{port}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    note.unlink()


def stop(process: subprocess.Popen) -> None:
    """Kills the whole family: asked to end, it takes half a minute."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)
