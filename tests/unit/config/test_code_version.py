"""The code that made a result is named by what is certain: a commit, else the files themselves."""

import os
import subprocess
from pathlib import Path

import pytest

from selectmoe import __version__
from selectmoe.config import code_version
from selectmoe.config.code_version import describe_code, hash_files


def git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=Tests", "-c", "user.email=tests@example.org")
    # Neither the settings of this machine nor the repository of a hook that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    answer = subprocess.run(
        ["git", *settings, *arguments], cwd=folder, env=environment, capture_output=True, check=True
    )
    return answer.stdout.decode().strip()


@pytest.fixture
def package(tmp_path):
    """A package of one module, in a folder of no repository."""
    folder = tmp_path / "checkout" / "selectmoe"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("X = 1\n")
    (folder.parent / "pyproject.toml").write_text('[project]\nname = "selectmoe"\n')
    return folder


@pytest.fixture
def committed(package):
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "First")
    return package


def test_a_clean_checkout_is_its_commit(committed):
    commit = git(committed, "rev-parse", "HEAD")
    assert describe_code(committed) == {"version": __version__, "commit": commit}


@pytest.mark.parametrize("file", ["selectmoe/__init__.py", "selectmoe/new.py", "jobs/new.py"])
def test_uncommitted_code_is_said_and_hashed(committed, file):
    path = committed.parent / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("X = 2\n")
    described = describe_code(committed)
    assert described["commit"] == git(committed, "rev-parse", "HEAD")
    assert described["uncommitted_changes"] is True
    assert described["files_sha256"] == hash_files(committed)


def test_files_that_are_no_code_leave_a_checkout_clean(committed):
    (committed.parent / "outputs").mkdir()
    (committed.parent / "outputs" / "manifest.json").write_text("{}")
    assert "uncommitted_changes" not in describe_code(committed)


def test_a_worktree_is_a_checkout(committed, tmp_path):
    git(committed, "worktree", "add", "--quiet", str(tmp_path / "other"))
    assert describe_code(tmp_path / "other" / "selectmoe").keys() == {"version", "commit"}


def test_the_repository_around_an_environment_is_not_ours(committed):
    site_packages = committed.parent / ".venv" / "site-packages" / "selectmoe"
    site_packages.mkdir(parents=True)
    assert describe_code(site_packages).keys() == {"version", "files_sha256"}
    (committed.parent / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert describe_code(committed).keys() == {"version", "files_sha256"}


def test_a_repository_without_a_commit_has_none(package):
    git(package.parent, "init", "--quiet")
    assert describe_code(package).keys() == {"version", "files_sha256"}


def test_a_variable_of_a_git_hook_changes_nothing(committed, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/no/such/folder")
    assert describe_code(committed).keys() == {"version", "commit"}


@pytest.mark.parametrize("script", [None, "exit 1", "exec sleep 60"])
def test_git_that_is_missing_broken_or_slow_costs_only_the_commit(
    committed, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(code_version, "GIT_TIMEOUT_SECONDS", 0.5)
    commands = tmp_path / "bin"
    commands.mkdir()
    if script is not None:
        (commands / "git").write_text(f"#!/bin/sh\n{script.replace('sleep', '/bin/sleep')}\n")
        (commands / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    assert describe_code(committed).keys() == {"version", "files_sha256"}


def test_the_hash_is_of_names_and_contents_and_not_of_compiled_files(package):
    before = hash_files(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "__init__.pyc").write_bytes(b"compiled")
    assert hash_files(package) == before
    (package / "__init__.py").rename(package / "renamed.py")
    assert hash_files(package) != before


def test_this_package_is_named_once_for_a_process():
    assert code_version.code_version() is code_version.code_version()
    assert code_version.code_version()["version"] == __version__
