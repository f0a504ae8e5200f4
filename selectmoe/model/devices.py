"""Defaults of device, dtype and experts implementation, the same for every stage."""

import torch

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
