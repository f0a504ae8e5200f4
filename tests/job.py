"""A command of jobs/ as a user runs it: a process of its own, in another folder."""

import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def without_report(command: str, arguments: Iterable[str | Path]) -> list[str]:
    """The arguments, for a selection with report=none unless they say otherwise: a report takes 2
    CPU seconds, and 4 more in a process that has not loaded torch."""
    given = [str(argument) for argument in arguments]
    says = command != "select" or any(argument.startswith("report=") for argument in given)
    return given if says else [*given, "report=none"]


class Job:
    """Runs `python jobs/<name>.py` from another folder than the checkout."""

    def __init__(self, repository: Path, folder: Path, name: str = "select") -> None:
        self.command = [sys.executable, str(repository / "jobs" / f"{name}.py")]
        self.folder = folder
        self.name = name

    def start(self, *arguments: str | Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *without_report(self.name, arguments)],
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

    def cpu_seconds_of_help(self) -> float:
        """CPU rather than wall time: another test may be at work on the same cores."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
