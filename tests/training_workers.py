"""The processes in which Ray trains, for the tests that kill one."""

import contextlib
import os

import psutil


def training_workers() -> list[psutil.Process]:
    """Those of the Rays that this test process or a command of it has started."""
    found = []
    for process in psutil.process_iter():
        # A process may end meanwhile; psutil does not read those of another user.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            is_ours = process.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]
            if is_ours and "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found
