"""The error that ends a training run, and how it lists rows."""

from collections.abc import Sequence

from selectmoe.errors import SelectMoeError

NUM_LISTED = 8  # rows of a bad batch that a message lists


class TrainingStoppedError(SelectMoeError, RuntimeError):
    """Training cannot succeed, as with a NaN loss; raised on all workers in the same step."""


def list_ids(rows: Sequence[str]) -> str:
    """'cot-17', 'cot-4' and 22 more"""
    more = f" and {len(rows) - NUM_LISTED} more" if len(rows) > NUM_LISTED else ""
    return ", ".join(map(repr, rows[:NUM_LISTED])) + more
