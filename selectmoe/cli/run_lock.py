"""The lock of an output folder: at most one running process writes into it.

The kernel holds the lock for the process that opened the file, and releases it when the process
ends, however that happens. A file that a killed run left behind therefore locks nothing.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from selectmoe.errors import ResumeError

LOCK_NAME = ".lock"
# What file systems without locks answer; some network mounts have none.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which is created where it is absent.

    Raises ResumeError, with the process that holds it, where a run is active in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_NAME
    descriptor = _acquire(file)
    try:
        _write_owner(descriptor, file)
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            raise ResumeError(
                f"{file.parent}: this run is running: {owner}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; start no second run here", file)
            return descriptor
        if _is_file_of(descriptor, file):
            return descriptor
        os.close(descriptor)  # its owner deleted it between our two calls: that lock is of no file


def _is_file_of(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int, file: Path) -> None:
    owner = {"process_id": os.getpid(), "host": socket.gethostname()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    except OSError as error:
        error.filename = str(file)  # a write does not name the file
        raise


def _read_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1_000, 0))
        return f"process {owner['process_id']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"
