"""Which failures of a training worker are retried, and what is said of the others."""

import errno

import pytest
import torch

from selectmoe.errors import DataError, NotEnoughMemoryError
from selectmoe.training.failures import (
    forget_failure,
    is_lasting,
    naming_the_remedy,
    note_failure,
    noted_failure,
)


@pytest.mark.parametrize(
    "error",
    [
        DataError("corpus.jsonl: no rows"),
        IndexError("index out of range in self"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_failure_that_would_come_again_is_not_retried(error):
    assert is_lasting(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:5342"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        OSError(errno.EIO, "Input/output error"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
    ],
)
def test_what_comes_from_a_lost_worker_or_a_network_is_retried(error):
    assert not is_lasting(error)


def test_a_noted_failure_holds_until_the_run_is_started_again(tmp_path):
    assert noted_failure(tmp_path) is None
    try:
        [][1]
    except IndexError as error:
        message = note_failure(tmp_path, error)
    assert message == (
        f"training stopped: IndexError: list index out of range; details: "
        f"{tmp_path}/training_error.txt"
    )
    assert noted_failure(tmp_path) == message
    assert "Traceback" in (tmp_path / "training_error.txt").read_text()
    forget_failure(tmp_path)
    assert noted_failure(tmp_path) is None


def test_running_out_of_memory_names_the_setting_to_lower():
    with pytest.raises(NotEnoughMemoryError) as stopped, naming_the_remedy("lower batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    assert str(stopped.value) == (
        "training ran out of memory: lower batch_size (CUDA out of memory. Tried to allocate 2.00 "
        "GiB. GPU 0 has)"
    )
    with pytest.raises(KeyError), naming_the_remedy("lower batch_size"):
        raise KeyError("gate")
