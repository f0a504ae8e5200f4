"""The access rights of written files: those that the user's umask gives to any new file."""

import os
from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Gives the files of a folder the rights of new files. safetensors ignores the umask and lets
    only the owner read what it writes, while the next stage may run as another user."""
    rights = 0o666 & ~_umask()
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(rights)


def _umask() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text("ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)  # not on Linux; for a moment it holds for other threads, too
    os.umask(mask)
    return mask
