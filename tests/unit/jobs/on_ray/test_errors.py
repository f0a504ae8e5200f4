from jobs.on_ray.errors import user_mistake
from selectmoe.errors import DataError


class WrappedByRay(Exception):
    """As RayTaskError: the worker's exception stands in `cause`, not in __cause__."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_a_mistake_is_found_inside_what_ray_made_of_it():
    mistake = DataError("corpus.jsonl: no such file")
    wrapped = raised_from(RuntimeError("execution failed"), WrappedByRay(mistake))
    assert user_mistake(wrapped) is mistake


def test_a_bug_is_no_mistake():
    assert user_mistake(raised_from(RuntimeError("x"), KeyError("y"))) is None
