"""A command of jobs/ as a user runs it: a process of its own, in another folder."""

import resource
import subprocess
import sys
from pathlib import Path


class Job:
    """Runs `python jobs/<name>.py` from another folder than the checkout."""

    def __init__(self, repository: Path, folder: Path, name: str = "select") -> None:
        self.command = [sys.executable, str(repository / "jobs" / f"{name}.py")]
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

    def cpu_seconds_of_help(self) -> float:
        """CPU rather than wall time: another test may be at work on the same cores."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
