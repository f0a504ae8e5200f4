"""The rows of bench_gate_kinds.py as numbers of rows: what is compared with what.

Shape letters: N = rows, P = pairs, K = copies of one kind.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gate_kinds_rows import (
    CALIBRATION,
    PAIR_FILES,
    RATED,
    SHORT,
    TEST,
    TRAINING,
    VALIDATION,
    Row,
)
from benchmarks.unseen_corruptions import UNSEEN_CORRUPTIONS
from selectmoe.data.chat import ChatTokenizer
from selectmoe.records import Sample, TokenizedSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class CopySet:
    """By kind: originals that have a copy of this kind, and these copies, (K,) each."""

    by_kind: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True, eq=False)
class PairSet:
    """Two answers to a question, (P,) each."""

    better: np.ndarray
    worse: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One half of the evaluation: A chooses among mixes, B reports. Without a file, a part is
    empty."""

    seen: CopySet
    unseen: CopySet
    pairs: Mapping[str, PairSet]
    rated: PairSet  # all rows of either label: the two arrays differ in length
    short: CopySet


@dataclass(frozen=True, slots=True, eq=False)
class KindRows:
    """Every row that has an answer token, and the sets of them."""

    samples: list[Sample]
    tokenized: list[TokenizedSample]
    kinds_N: np.ndarray  # "" is an original
    originals_N: np.ndarray  # number of the original in its part, -1 without one
    num_answer_N: np.ndarray
    training_N: np.ndarray  # bool
    calibration: np.ndarray
    with_likelihood: np.ndarray  # rows whose NLL is computed, which takes a head and a second pass
    halves: Mapping[str, Half]
    num_dropped: int  # rows without an answer token within the maximum length


def make_sets(rows: Sequence[Row], tokenizer: ChatTokenizer) -> KindRows:
    outcomes = tokenizer.tokenize_each([row.sample for row in rows])
    kept, tokenized = [], []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, TokenizedSample) and outcome.answer_mask.any():
            kept.append(row)
            tokenized.append(outcome)
    logger.info("%d rows, %d without an answer token", len(rows), len(rows) - len(kept))
    parts_N = np.array([row.part for row in kept])
    return KindRows(
        samples=[row.sample for row in kept],
        tokenized=tokenized,
        kinds_N=np.array([row.kind for row in kept]),
        originals_N=np.array([row.original for row in kept]),
        num_answer_N=np.array([row.answer_mask.sum() for row in tokenized]),
        training_N=parts_N == TRAINING,
        calibration=np.flatnonzero(parts_N == CALIBRATION),
        with_likelihood=np.flatnonzero([has_likelihood(row) for row in kept]),
        halves={name: half(kept, name) for name in "AB"},
        num_dropped=len(rows) - len(kept),
    )


def has_likelihood(row: Row) -> bool:
    """Rated rows, short replies, test rows and their copies of unseen kinds."""
    if row.part == TEST:
        return not row.kind or row.kind in UNSEEN_CORRUPTIONS
    return row.part in (SHORT, RATED, *PAIR_FILES)


def half(rows: Sequence[Row], name: str) -> Half:
    part = {"A": VALIDATION, "B": TEST}[name]
    chosen = [
        (number, row) for number, row in enumerate(rows) if row.is_for_choosing == (name == "A")
    ]
    # Rated rows come from one file without a split: every other one.
    rated = [number for number, row in enumerate(rows) if row.part == RATED]["AB".index(name) :: 2]
    return Half(
        seen=copy_set(rows, part, is_unseen=False),
        unseen=copy_set(rows, part, is_unseen=True),
        pairs={name: pair_set(chosen, name) for name in PAIR_FILES},
        rated=PairSet(
            better=np.array([number for number in rated if rows[number].is_better], int),
            worse=np.array([number for number in rated if not rows[number].is_better], int),
        ),
        short=copy_set(rows, SHORT, is_unseen=False),
    )


def copy_set(rows: Sequence[Row], part: str, *, is_unseen: bool) -> CopySet:
    """Kinds in alphabetical order."""
    originals = {row.original: n for n, row in enumerate(rows) if row.part == part and not row.kind}
    found: dict[str, list[tuple[int, int]]] = {}
    for number, row in enumerate(rows):
        if row.part != part or not row.kind or (row.kind in UNSEEN_CORRUPTIONS) != is_unseen:
            continue
        if row.original in originals:
            found.setdefault(row.kind, []).append((originals[row.original], number))
    numbers = {kind: np.array(pairs) for kind, pairs in sorted(found.items())}
    return CopySet({kind: (pairs[:, 0], pairs[:, 1]) for kind, pairs in numbers.items()})


def pair_set(numbered: Sequence[tuple[int, Row]], part: str) -> PairSet:
    """The pairs of which both answers are there."""
    by_pair: dict[str, dict[bool, int]] = {}
    for number, row in numbered:
        if row.part == part:
            by_pair.setdefault(row.pair_id, {})[row.is_better] = number
    both = [pair for pair in by_pair.values() if len(pair) == 2]
    better, worse = (np.array([pair[label] for pair in both], int) for label in (True, False))
    return PairSet(better, worse)
