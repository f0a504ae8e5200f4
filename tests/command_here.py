"""A command of jobs/ in the process of the tests, which has torch and Ray imported already."""

import contextlib
import io
import logging
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.job import without_report

REPOSITORY = Path(__file__).resolve().parents[1]


class CommandHere:
    """Runs what `python jobs/<name>.py` runs, in `folder`; `Job` does it in a process of its own.

    A new process imports torch, transformers and Ray and starts a local Ray: more than ten CPU
    seconds. Here neither is paid, where there is a cluster: at `ray_address`, or where RAY_ADDRESS
    says. At the end the command is disconnected from it, as a process that ends is.
    """

    def __init__(
        self, folder: Path, name: str = "select", *, ray_address: str | None = None
    ) -> None:
        self.script = str(REPOSITORY / "jobs" / f"{name}.py")
        self.folder = folder
        self.name = name
        self.ray_address = ray_address

    def call(self, *arguments: str | Path) -> tuple[int, str]:
        """Exit status, and what was printed on both streams."""
        printed = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            _logs_to(printed),
            _process_restored(),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("sys.argv", [self.script, *without_report(self.name, arguments)])
            patch.setattr("sys.path", [*sys.path])
            if self.ray_address is not None:
                patch.setenv("RAY_ADDRESS", self.ray_address)
            try:
                with pytest.raises(SystemExit) as left:
                    runpy.run_path(self.script, run_name="__main__")
            finally:
                ray.shutdown()
        return left.value.code, printed.getvalue()

    def run(self, *arguments: str | Path) -> str:
        status, printed = self.call(*arguments)
        assert status == 0, printed
        return printed

    def refuse(self, *arguments: str | Path) -> str:
        """What a run prints that ends with a mistake: one line, status 2."""
        status, printed = self.call(*arguments)
        assert status == 2, printed
        return [line for line in printed.splitlines() if line.startswith("error: ")][-1]


@contextlib.contextmanager
def _logs_to(stream: io.StringIO) -> Iterator[None]:
    """pytest has handlers of its own, so that `configure_logging` adds none."""
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger(name) for name in ("selectmoe", "jobs")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextlib.contextmanager
def _process_restored() -> Iterator[None]:
    """`start_ray` makes SIGTERM an interruption, which pytest must not inherit, and sets a path."""
    before = signal.getsignal(signal.SIGTERM)
    python_path = os.environ.get("PYTHONPATH")
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if python_path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = python_path
