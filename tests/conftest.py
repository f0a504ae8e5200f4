"""What every test shares: no network, a Ray of its own, and what a machine may lack."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

# Set before anything imports transformers or datasets, which read them once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Takes two CPU seconds in every training, and no test has nodes that are taken away.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
# The models are so small that a second thread costs more than it gives, and two tests run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Token authentication with a token of the tests' own: left to itself, ray.init() writes one into
# the home folder, and every Ray head started later finds it there and enables authentication.
# A short name: Ray's sockets lie below it, and a socket's path has 107 characters at most.
_RAY_FOLDER = tempfile.TemporaryDirectory(prefix="smt-", ignore_cleanup_errors=True)
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = os.path.join(_RAY_FOLDER.name, "auth_token")
Path(os.environ["RAY_AUTH_TOKEN_PATH"]).write_text("token-of-the-select-moe-tests")
# A cluster that happens to run on this machine is not the tests' to use: neither one that the
# environment names, nor one that `ray start` wrote down in Ray's usual folder.
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_TMPDIR"] = _RAY_FOLDER.name

REPOSITORY = Path(__file__).resolve().parent.parent
# A minute or longer on a quiet machine. They begin, longest first, so that both processes of
# `make test` end with the many short files, and neither waits for the other's last long one.
LONG_FILES = (
    "test_submitted_jobs.py", "test_pretrain_command.py", "test_finetune_command.py",
    "test_select_command.py", "test_serve.py", "test_evaluate_command.py", "test_select_via.py",
    "test_growing_cluster.py", "test_pretrain_base.py", "test_bench_quality.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first. Skips the tests marked `gpu`, with the reason, where there is no
    CUDA device."""
    items.sort(key=_position_of_file)  # stable: tests of a file, and other files, keep their order
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or _has_cuda():  # torch is imported only where a test asks for it
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Corpora of others, kept beside the checkout and never in it; skips where they are absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the corpora in ../shared/data, which are not part of the project")
    return folder


def _position_of_file(item: pytest.Item) -> int:
    name = item.path.name
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


def _has_cuda() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
