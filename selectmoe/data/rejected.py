"""Rejected rows: one schema, one file and one limit for every stage.

<run>/rejected/rejected.jsonl   {"file", "row", "dataset", "id", "reason", "detail"}, a row a line
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from selectmoe.data.writers import write_jsonl
from selectmoe.errors import TooManyRejectedError
from selectmoe.records import RejectedRow, TokenizedSample, UnscoredSample

NO_ANSWER_TOKEN = "no assistant token has another token before it that could predict it"
RejectedCounts = dict[str, Counter[str]]
"""Rows by dataset and, within one, by reason."""


def rejected_file(run: Path) -> Path:
    return run / "rejected" / "rejected.jsonl"


def write_rejected(rows: Iterable[RejectedRow], run: Path) -> RejectedCounts:
    """Writes the file below the folder of a run. `rows` may be a generator: memory stays flat."""
    counts: RejectedCounts = {}

    def lines() -> Iterator[dict[str, object]]:
        for row in rows:
            counts.setdefault(row.dataset, Counter())[row.reason] += 1
            columns = asdict(row)
            yield {"id" if name == "sample_id" else name: columns[name] for name in columns}

    file = rejected_file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, lines())
    return counts


def refuse_cut_answer(sample: TokenizedSample) -> TokenizedSample | UnscoredSample:
    """The sample, unless its prompt alone fills the maximum sequence length.

    Stage 2 must not select a row that stage 3 cannot learn from, so both refuse it.
    """
    if not sample.truncated or sample.answer_mask[1:].any():
        return sample
    detail = (
        f"none of its first {len(sample.token_ids)} tokens is the assistant's; raise the maximum "
        "sequence length"
    )
    return UnscoredSample(sample.sample_id, "no_answer_token", detail)


def reject(refused: UnscoredSample, *, dataset: str, source: str) -> RejectedRow:
    """The rejection of a sample that was read at `source`, "<file>:<row>" or empty."""
    file, _, row = source.rpartition(":")
    number = int(row or 0)
    return RejectedRow(file, number, dataset, refused.sample_id, refused.reason, refused.detail)


def describe(row: RejectedRow) -> str:
    """corpus.jsonl:41: 'messages' must be a non-empty list, got []"""
    return f"{row.file}:{row.row}: {row.detail}"


def require_few_rejected(
    *, num_rejected: int, num_read: int, max_rejected: float, run: Path, first: str = ""
) -> None:
    """Raises TooManyRejectedError for a share above `max_rejected`, and where no row is left.

    run: its rejected rows are on disk already. first: one of them, as `describe` gives it.
    """
    if not num_rejected:
        return
    examples = f"{f'first: {first}; ' if first else ''}all of them: {rejected_file(run)}"
    if num_rejected == num_read:
        raise TooManyRejectedError(f"all {num_read} rows are rejected; {examples}")
    if num_rejected > max_rejected * num_read:
        enough = math.ceil(1_000 * num_rejected / num_read) / 1_000
        raise TooManyRejectedError(
            f"{num_rejected} of {num_read} rows are rejected, more than "
            f"max_rejected={max_rejected:g} allows; {examples}; to continue without them: "
            f"--resume {run} max_rejected={enough:g}"
        )
