"""Reads rated rows: rows of a corpus with a label each, alone or in pairs of a better and a worse
answer."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectmoe.config.columns import ColumnRules
from selectmoe.data.message_fields import is_answer
from selectmoe.data.readers import read_corpora
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

LABEL, PAIR_ID = "label", "pair_id"


@dataclass(frozen=True, slots=True)
class RatedRow:
    """A sample and what a person said of it."""

    sample: Sample
    label: float  # higher is better
    pair_id: str | None
    prompt: str  # equal for rows that answer the same


def read_rated(specs: Sequence[str], columns: Mapping[str, str]) -> list[RatedRow]:
    """Raises DataError, with file and row, for a row that is no sample or has no label that is a
    number, where only some rows have a pair_id or a pair is none, and where all labels are equal.
    """
    outcomes = read_corpora(specs, rules=ColumnRules(columns, keeps_extra=True))
    rows = [_rated(outcome) for outcome in outcomes]
    files = ", ".join(specs)
    alone = [row for row in rows if row.pair_id is None]
    if alone and len(alone) < len(rows):
        raise DataError(
            f"{alone[0].sample.source}: {PAIR_ID} must be in all rated rows or in none; "
            f"{len(alone):,} of {len(rows):,} rows lack it"
        )
    if alone and len({row.label for row in rows}) == 1:
        raise DataError(
            f"{files}: labels must differ, got {rows[0].label:g} for all {len(rows):,} rows"
        )
    pairs_of(rows)  # as early as what is wrong with single rows
    return rows


def pairs_of(rows: Sequence[RatedRow]) -> list[tuple[int, int]]:
    """Positions of the better and the worse row of each pair; empty where rows are rated alone.

    Raises DataError for a pair that is not two rows with different labels.
    """
    by_pair: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        if row.pair_id is not None:
            by_pair.setdefault(row.pair_id, []).append(position)
    return [_better_first(rows, positions) for positions in by_pair.values()]


def good_rows(rows: Sequence[RatedRow]) -> list[bool]:
    """Which rows count as good: those above the median label, or at it where none is above."""
    middle = statistics.median_low(row.label for row in rows)
    above = [row.label > middle for row in rows]
    return above if any(above) else [row.label >= middle for row in rows]


def _better_first(rows: Sequence[RatedRow], positions: Sequence[int]) -> tuple[int, int]:
    first = rows[positions[0]]
    name = f"{first.sample.source}: pair {first.pair_id!r}"
    if len(positions) != 2:
        raise DataError(f"{name} must have two rows, got {len(positions)}")
    one, other = positions
    if rows[one].label == rows[other].label:
        raise DataError(f"{name} must have two different labels, got {first.label:g} twice")
    return (one, other) if rows[one].label > rows[other].label else (other, one)


def _rated(outcome: Sample | RejectedRow) -> RatedRow:
    if isinstance(outcome, RejectedRow):
        raise DataError(f"{outcome.file}:{outcome.row}: no sample: {outcome.detail}")
    extra: dict[str, Any] = json.loads(outcome.extra_columns or "{}")
    pair_id = extra.get(PAIR_ID)
    return RatedRow(
        sample=outcome,
        label=_label(extra, outcome.source),
        pair_id=None if pair_id is None else str(pair_id),
        prompt=_prompt(outcome),
    )


def _label(extra: Mapping[str, Any], source: str) -> float:
    if LABEL not in extra:
        raise DataError(f"{source}: a rated row must have a {LABEL}, a number")
    label = extra[LABEL]
    if not isinstance(label, bool | int | float) or label != label:
        raise DataError(f"{source}: {LABEL} must be a number, got {label!r}")
    return float(label)


def _prompt(sample: Sample) -> str:
    """All turns before the last answer."""
    answers = [index for index, message in enumerate(sample.messages) if is_answer(message)]
    before = sample.messages[: answers[-1]] if answers else ()
    return json.dumps([[message.role, message.content] for message in before])
