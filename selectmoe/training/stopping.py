"""Why a training run refuses to go on."""

from collections.abc import Sequence

from selectmoe.errors import SelectMoeError

NUM_NAMED = 8  # rows of a bad batch that a message names


class TrainingStoppedError(SelectMoeError, RuntimeError):
    """Training cannot lead anywhere; raised on all workers in the same step."""


def list_ids(rows: Sequence[str]) -> str:
    """'cot-17', 'cot-4' and 22 more"""
    more = f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
    return ", ".join(map(repr, rows[:NUM_NAMED])) + more
