"""The version of the code that made a result: its commit, or a hash of the package's files."""

import functools
import hashlib
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import selectmoe

PACKAGE = Path(selectmoe.__file__).resolve().parent
PROJECT = "selectmoe"  # [project] name in pyproject.toml
CODE_FOLDERS = ("selectmoe", "jobs", "serve")
GIT_TIMEOUT_SECONDS = 5


@functools.cache
def code_version() -> dict[str, Any]:
    """What manifests say of the code; the first call decides, since a checkout may move on."""
    return describe_code(PACKAGE)


def library_versions(libraries: Iterable[str]) -> dict[str, str | None]:
    """Versions of selectmoe, Python and the libraries, without importing them; None if missing."""
    versions: dict[str, str | None] = {
        "selectmoe": selectmoe.__version__,
        "python": platform.python_version(),
    }
    for library in libraries:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions


def describe_code(package: Path) -> dict[str, Any]:
    """{"version", "commit"} of a clean checkout; what is not committed adds two keys.

    {"version": "0.1.0", "commit": "1f0c…", "uncommitted_changes": true, "files_sha256": "9ab4…"}
    {"version": "0.1.0", "files_sha256": "9ab4…"}    an installed package, or git does not answer
    """
    described: dict[str, Any] = {"version": selectmoe.__version__}
    status = _git_status(package.parent) if _is_checkout(package.parent) else None
    if status is not None:
        commit, changes = status
        described["commit"] = commit
        if not changes:
            return described
        described["uncommitted_changes"] = True
    return described | {"files_sha256": hash_files(package)}


def hash_files(package: Path) -> str:
    """SHA-256 over the names and contents of all files of a package, compiled ones left out."""
    digest = hashlib.sha256()
    files = [path for path in package.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.relative_to(package).as_posix()):
        if "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {path.relative_to(package).as_posix()}\n".encode())
    return digest.hexdigest()


def _is_checkout(folder: Path) -> bool:
    """Whether `folder` is the root of a git checkout, and of this project.

    A virtual environment inside some other project's repository lies in a checkout, too.
    """
    if not (folder / ".git").exists():  # a folder, or the file of a worktree
        return False
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(project.get("name") == PROJECT)


def _git_status(checkout: Path) -> tuple[str, bool] | None:
    """The commit, and whether the code differs from it; None where git does not say."""
    # Inside a git hook these variables name another repository or index.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    command = ["git", "-C", str(checkout), "--no-optional-locks", "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=all", "--", *CODE_FOLDERS]
    try:
        answer = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=True,
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.splitlines()
    commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if not commits or commits == ["(initial)"]:
        return None
    return commits[0], any(not line.startswith("#") for line in lines)
