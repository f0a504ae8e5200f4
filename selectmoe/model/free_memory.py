"""Free memory of a machine or a GPU, and whether a model's weights fit; imports no torch."""

from pathlib import Path

from selectmoe.errors import NotEnoughMemoryError

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2}


def free_memory(*, on_gpu: bool) -> tuple[int, str]:
    """Free bytes here, and their kind: "memory" or "GPU memory".

    Raises DeviceError where torch cannot use the GPU.
    """
    if not on_gpu:
        return free_cpu_memory(), "memory"
    from selectmoe.model.devices import free_gpu_memory

    return free_gpu_memory(), "GPU memory"


def free_cpu_memory() -> int:
    """Memory available without swapping, or up to the container's limit where that is less."""
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    kilobytes = {name: text for name, _, text in (line.partition(":") for line in lines)}
    free = 1_024 * int(kilobytes["MemAvailable"].split()[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text("utf-8").strip()) != "max":
        free = min(free, max(int(text) - int(used.read_text("utf-8")), 0))
    return free


def require_weights_fit(
    num_parameters: int, dtype: str, *, purpose: str, free: int, kind: str
) -> None:
    """Raises NotEnoughMemoryError where the weights alone need more than `free` bytes.

    purpose: "scoring", for the message. kind: "memory" or "GPU memory".
    """
    needed = num_parameters * BYTES_OF_DTYPE[dtype]
    if needed > free:
        raise NotEnoughMemoryError(
            f"{purpose} needs at least {in_words(needed)} of {kind} for "
            f"{num_parameters / 1e9:.2f} billion parameters in {dtype}, and has {in_words(free)}; "
            "use a smaller model or a larger machine"
        )


def in_words(num_bytes: int) -> str:
    """13,476,839,424 -> "13.5 GB", 6,322,032 -> "6.3 MB"."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB"
