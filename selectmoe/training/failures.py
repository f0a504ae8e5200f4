"""Failures of training workers that a retry cannot mend; imports no torch.

Ray restarts all workers after any exception of one of them. A failure that would only come again is
noted in the run's folder first, and workers that find a note end at once.
"""

import contextlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path

from selectmoe.data.writers import write_json
from selectmoe.errors import NotEnoughMemoryError, SelectMoeError, full_disk, one_line

NOTE_NAME = "training_failure.json"
DETAILS_NAME = "training_error.txt"
# A mistake in the code, the data or the model comes again. A RuntimeError need not: workers that
# lose their connection to a lost one raise it.
_LASTING = (
    SelectMoeError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    NameError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
# A RuntimeError of CUDA kernels that check their input, such as a token outside the vocabulary.
_DEVICE_ASSERT = "device-side assert"


def is_lasting(error: BaseException) -> bool:
    """True for a failure that a retry with the same data and settings would repeat."""
    if isinstance(error, _LASTING) or is_out_of_memory(error) or full_disk(error):
        return True
    return _DEVICE_ASSERT in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """True where torch could not allocate memory on a GPU or a CPU, and for Python's own error."""
    names = {kind.__name__ for kind in type(error).__mro__} & {"OutOfMemoryError", "MemoryError"}
    return bool(names) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def naming_the_remedy(remedy: str) -> Iterator[None]:
    """Turns running out of memory into a NotEnoughMemoryError that says what to lower.

    remedy: "lower training.batch_size"
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SelectMoeError) or not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError(
            f"training ran out of memory: {remedy} ({one_line(error)})"
        ) from error


def describe_failure(error: BaseException) -> str:
    """`IndexError: index out of range in self`; the message alone of a user's mistake."""
    if isinstance(error, SelectMoeError):
        return one_line(error)
    if (full := full_disk(error)) is not None:
        return f"{full.filename}: {full.strerror}" if full.filename else str(full.strerror)
    return f"{type(error).__name__}: {one_line(error)}"


def note_failure(run: Path, error: BaseException) -> str:
    """Notes a failure in the folder of a run, as far as its disk has room; returns what is noted.

    The stack of an error that is not a user's mistake goes to a file beside it.
    """
    message = describe_failure(error)
    if not isinstance(error, SelectMoeError):
        message = f"training stopped: {message}"
        with contextlib.suppress(OSError):
            story = "".join(traceback.format_exception(error))
            (run / DETAILS_NAME).write_text(story, encoding="utf-8")
            message += f"; details: {run / DETAILS_NAME}"
    with contextlib.suppress(OSError):
        write_json(run / NOTE_NAME, {"message": message})
    return message


def noted_failure(run: Path) -> str | None:
    """What another worker, or this one before its restart, has noted."""
    try:
        return str(json.loads((run / NOTE_NAME).read_text("utf-8"))["message"])
    except FileNotFoundError:
        return None


def forget_failure(run: Path) -> None:
    """Called before a run starts or is resumed: its cause may be mended."""
    (run / NOTE_NAME).unlink(missing_ok=True)
