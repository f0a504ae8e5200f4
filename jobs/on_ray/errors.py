"""Finds the error of the user, and the first cause, inside the exceptions that Ray wraps around."""

from pathlib import Path

from selectmoe.cli.command_line import is_user_mistake
from selectmoe.errors import SelectMoeError, causes, full_disk, one_line


def user_mistake(error: BaseException | None) -> SelectMoeError | OSError | None:
    """The error inside `error` that a user can mend; None where there is none."""
    for cause in causes(error):
        # RayTaskError is also of the worker's class, but its text is a stack; the worker's own
        # exception is in `cause`.
        if is_user_mistake(cause) and not _wraps(cause):
            return cause
    return None if error is None else full_disk(error)


def describe_cause(error: BaseException) -> str:
    """`IndexError: index out of range in self`: the innermost error that is not one of Ray's own,
    else the last line of what Ray says."""
    chain = [cause for cause in causes(error) if not _wraps(cause)]
    ours = [cause for cause in chain if not type(cause).__module__.startswith("ray.")]
    if not ours:
        return (str(error).strip() or type(error).__name__).splitlines()[-1]
    return f"{type(ours[-1]).__name__}: {one_line(ours[-1])}"


def write_details(file: Path, story: object) -> str:
    """Writes the whole story of a failure and returns where it is, "; details: FILE".

    Empty where it cannot be written: a full disk must not hide the error.
    """
    try:
        file.write_text(str(story), encoding="utf-8")
    except OSError:
        return ""
    return f"; details: {file}"


def _wraps(error: BaseException) -> bool:
    return isinstance(getattr(error, "cause", None), BaseException)
