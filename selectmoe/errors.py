"""Every error that a user of Select-MoE can cause, as one tree.

    SelectMoeError
    ├── ConfigError (ValueError)            a setting is unknown, of a wrong type or out of range
    │   └── NotEnoughMemoryError            a command needs more than the machine has free
    ├── DataError (ValueError)              a file or a row breaks the input contract
    │   ├── TooManyRejectedError            more rows were rejected than `max_rejected` allows
    │   └── ChatTemplateError               a chat template refuses a conversation, or changes it
    ├── ModelError (ValueError)             a model folder is not what the command needs
    │   └── ParityError                     a converted model does not compute what its base does
    ├── ResumeError (RuntimeError)          an output folder belongs to another run, or is in use
    ├── StorageError (RuntimeError)         a disk is full or takes no more files
    ├── DeviceError (RuntimeError)          a GPU is reserved that torch cannot use
    ├── ScoreRejectedError (ValueError)     a score server has no score for a sample, and says why
    ├── ScoreRequestError (RuntimeError)    a score server refused, or gave no scores
    │   ├── UnauthorizedError               it got no API key, or a wrong one
    │   └── ServerUnavailableError          it was not there, not ready or overloaded
    ├── NoTokenScoresError                  a report is written without token scores
    ├── TrainingStoppedError (RuntimeError) training cannot succeed, as with a NaN loss
    ├── ClusterTokenError (RuntimeError)    a token is demanded of a cluster without one
    ├── ClusterError (RuntimeError)         no cluster answers, or it has not what a run needs
    ├── ScoringError (RuntimeError)         scoring ended with shards left
    ├── TrainingError (RuntimeError)        workers were lost more often than allowed, or failed
    └── EvaluationError (RuntimeError)      the worker was lost, or failed

ClusterError and the last two live in `jobs/`, NoTokenScoresError in `selectmoe/report/`.
A message names the file, row or key, then the rule, then the value. The commands in `jobs/` print
it on one line and exit with status 2; nothing else in the package catches it.
"""

import errno
import os
from collections.abc import Iterator, Sequence

# What the kernel answers where a disk takes no more bytes.
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries that write by themselves (safetensors, torch, Ray) report it as text only.
_FULL_DISK_TEXTS = (*map(os.strerror, DISK_IS_FULL), "os error 28", "OutOfDiskError")


class SelectMoeError(Exception):
    """A mistake that the user can mend; never a bug of ours."""


class ConfigError(SelectMoeError, ValueError):
    """A setting is unknown, of a wrong type or out of range."""


class NotEnoughMemoryError(ConfigError):
    """The settings ask for more memory than a machine or a worker has."""


class DataError(SelectMoeError, ValueError):
    """A file or a row breaks the input contract."""


class TooManyRejectedError(DataError):
    """More rows were rejected than `max_rejected` allows."""


class ChatTemplateError(DataError):
    """A chat template refuses a conversation, changes its texts or leaves some of them out."""

    def __init__(self, message: str, *, reason: str = "chat_template") -> None:
        super().__init__(message)
        self.reason = reason  # as in rejected.jsonl


class ModelError(SelectMoeError, ValueError):
    """A model folder is not what the command needs."""


class ParityError(ModelError):
    """A converted model does not compute what its base computes."""


class ResumeError(SelectMoeError, RuntimeError):
    """An output folder belongs to another run, or a process is running in it."""


class StorageError(SelectMoeError, RuntimeError):
    """A disk is full, over quota or takes no more files."""


class DeviceError(SelectMoeError, RuntimeError):
    """A GPU is reserved for a worker, and torch cannot use it."""


class ScoreRejectedError(SelectMoeError, ValueError):
    """A score server has no score for a sample, and says why."""

    def __init__(self, message: str, *, error_type: str = "") -> None:
        super().__init__(message)
        self.error_type = error_type  # a key for programs: "validation", "chat_template", …


class ScoreRequestError(SelectMoeError, RuntimeError):
    """A score server refused a request, or gave an answer without scores."""

    def __init__(self, message: str, *, status: int | None = None, error_type: str = "") -> None:
        super().__init__(message)
        self.status = status  # None where nothing came that has one
        self.error_type = error_type  # a key for programs: "too_large", "validation", …


class UnauthorizedError(ScoreRequestError):
    """A score server got no API key, or a wrong one."""


class ServerUnavailableError(ScoreRequestError):
    """In the time given a score server was not there, not ready or overloaded."""


class TrainingStoppedError(SelectMoeError, RuntimeError):
    """Training cannot succeed, as with a NaN loss; raised on all workers in the same step."""


class ScoringError(SelectMoeError, RuntimeError):
    """Scoring ended with shards left: workers were lost for good, or failed."""


def list_names(names: Sequence[str], *, most: int = 8) -> str:
    """'cot-17', 'cot-4' and 22 more"""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message, else the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """The whole message on one line, at most 400 characters; else the name of its type."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def full_disk(error: BaseException) -> OSError | None:
    """The full disk behind an error, named where the file is known; None for any other error."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in DISK_IS_FULL:
            assert cause.errno is not None
            return OSError(cause.errno, os.strerror(cause.errno), cause.filename)
    if any(text in str(cause) for cause in chain for text in _FULL_DISK_TEXTS):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, outermost first. Ray has the error of a worker in `cause`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
