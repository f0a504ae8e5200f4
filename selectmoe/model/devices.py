"""Defaults of device, dtype and experts implementation, the same for every stage."""

import os
import socket

import torch

from selectmoe.errors import DeviceError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(name: str | None, *, on_gpu: bool) -> torch.dtype:
    """The dtype of this name; None is bfloat16 on a GPU and float32 on a CPU."""
    return DTYPES[name or ("bfloat16" if on_gpu else "float32")]


def choose_experts(name: str | None, *, on_gpu: bool) -> str:
    """The experts implementation of this name; None is the faster one.

    A loop over experts is the faster one on a CPU, and waits for the device once per expert on a
    GPU.
    """
    return name or ("grouped_mm" if on_gpu else "eager")


def require_gpu() -> None:
    """Raises DeviceError, with torch's reason, where a GPU is reserved and torch cannot use it.

    Without it a worker would compute on its CPU, for days.
    """
    if torch.cuda.is_available():
        return
    raise DeviceError(
        f"a GPU of {socket.gethostname()} is reserved, and torch cannot use it: {_gpu_problem()}; "
        "install a torch that fits the driver, or start Ray with --num-gpus=0 to use CPUs"
    )


def free_gpu_memory() -> int:
    """Free bytes of the current GPU. Raises DeviceError where torch cannot use it."""
    require_gpu()
    free, _ = torch.cuda.mem_get_info()
    return free


def _gpu_problem() -> str:
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"it sees no device (CUDA_VISIBLE_DEVICES={visible})"
