from pathlib import Path

from ray.exceptions import ActorDiedError, RayTaskError

from jobs.on_ray.errors import describe_cause, user_mistake, write_details
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


def task_error(cause: Exception) -> Exception:
    """What `ray.get` raises: of the class of `cause`, and with a stack for a text."""
    error = RayTaskError("score", "Traceback\n  stack\nIndexError: far out", cause)
    return error.as_instanceof_cause()


def test_a_mistake_is_the_workers_own_and_not_the_stack_that_ray_made_of_it():
    mistake = DataError("corpus.jsonl: no such file")
    assert user_mistake(task_error(mistake)) is mistake


def test_an_error_of_a_worker_is_told_by_its_type_and_message_without_rays_advice():
    advice = RuntimeError("Task failed.\nTo change retry attempts, configure DataContext")
    error = raised_from(advice, task_error(IndexError("index out of range in self")))
    assert describe_cause(error) == "IndexError: index out of range in self"
    assert (
        "actor" in describe_cause(ActorDiedError()).lower()
    )  # Ray's own words where there is no other


def test_the_story_of_a_failure_is_left_out_where_the_disk_is_full(tmp_path):
    file = tmp_path / "error.txt"
    assert write_details(file, "story") == f"; details: {file}"
    assert file.read_text() == "story"
    assert write_details(Path("/dev/full"), "story" * 10_000) == ""
