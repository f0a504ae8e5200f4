"""Finds the error of the user inside the exceptions that Ray wraps around it."""

from selectmoe.cli.command_line import is_user_mistake
from selectmoe.errors import SelectMoeError


def user_mistake(error: BaseException | None) -> SelectMoeError | OSError | None:
    """The error inside `error` that a user can mend; None where there is none."""
    while error is not None:
        cause = getattr(error, "cause", None)  # RayTaskError holds the worker's exception here
        if isinstance(cause, BaseException):
            error = cause
        elif is_user_mistake(error):
            return error
        else:
            error = error.__cause__ or error.__context__
    return None
