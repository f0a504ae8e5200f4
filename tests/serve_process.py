"""`serve run` and `python -m serve` as a user starts them, in processes of their own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil

from tests.ray_head import stop

# A busy machine needs longer than Ray's 30 s until a node is registered, and longer than Serve's 5
# and 10 s until a proxy that starts has answered; it would be killed.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}


class ServeProcess:
    def __init__(self, process: subprocess.Popen, url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def printed(self) -> str:
        return self.log.read_text("utf-8")

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment; Ray writes its name into theirs."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(member.cmdline())
                if title.startswith("ray::ServeReplica:") and f":{deployment}" in title:
                    found.append(member)
        return found

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not self.is_ready():
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.2)


@contextlib.contextmanager
def serve_run(
    target: str | Path, *, url: str, folder: Path, environment: dict[str, str]
) -> Iterator[ServeProcess]:
    """`serve run TARGET`; see `started`."""
    command = [Path(sys.executable).with_name("serve"), "run", str(target)]
    with started(command, url=url, folder=folder, environment=environment) as running:
        yield running


@contextlib.contextmanager
def started(
    command: Sequence[str | Path], *, url: str, folder: Path, environment: dict[str, str | None]
) -> Iterator[ServeProcess]:
    """Ready when it is entered; at the end none of its processes is left.

    environment: variables to add; those that are None are taken away.
    """
    merged = {**os.environ, **PATIENCE, **environment}
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={name: value for name, value in merged.items() if value is not None},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        running = ServeProcess(process, url, log)
        running.wait_until_ready(timeout_seconds=240)
        yield running
    finally:
        if process.poll() is None:
            stop(process)
