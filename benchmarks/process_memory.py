"""Memory of processes, as the Linux kernel counts it."""

import contextlib
import re
from pathlib import Path

import psutil


def read_mb(pid: int, row: str, *, file: str = "status") -> float:
    """A row of /proc/PID/status or /proc/PID/smaps_rollup in MB; 0 if the process has ended.

    VmHWM is the peak resident size. Unlike ru_maxrss, it does not begin with the resident size that
    the parent process had when it forked.
    """
    with contextlib.suppress(OSError):
        number = re.search(rf"^{row}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.M)
        return int(number[1]) / 1e3 if number else 0.0
    return 0.0


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []
