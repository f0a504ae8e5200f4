"""Rejected rows have one schema and one file, and too many of them stop a run."""

import json

import pytest

from selectmoe.data.rejected import (
    describe,
    reject,
    rejected_file,
    require_few_rejected,
    write_rejected,
)
from selectmoe.errors import TooManyRejectedError
from selectmoe.records import UnscoredSample

ROWS = [
    reject(UnscoredSample("x", "no_label", "none"), dataset="a", source="/data/a:b.jsonl:41"),
    reject(UnscoredSample("", "invalid_json", "line 1"), dataset="a", source=""),
]


def test_every_row_is_a_line_and_is_counted(tmp_path):
    counts = write_rejected(iter(ROWS), tmp_path / "run")
    assert counts == {"a": {"no_label": 1, "invalid_json": 1}}
    lines = rejected_file(tmp_path / "run").read_text("utf-8").splitlines()
    assert lines[0] == (
        '{"file": "/data/a:b.jsonl", "row": 41, "dataset": "a", "id": "x", "reason": "no_label", '
        '"detail": "none"}'
    )
    assert json.loads(lines[1])["row"] == 0
    assert describe(ROWS[0]) == "/data/a:b.jsonl:41: none"


def test_too_many_rejected_rows_are_an_error_that_leads_to_the_cure(tmp_path):
    def check(num_rejected, num_read, max_rejected):
        require_few_rejected(
            num_rejected=num_rejected, num_read=num_read, max_rejected=max_rejected, run=tmp_path,
            first=describe(ROWS[0]),
        )  # fmt: skip

    check(1, 100, 0.01)
    check(0, 0, 0.0)
    with pytest.raises(TooManyRejectedError) as refused:
        check(2, 119, 0.01)
    assert str(refused.value) == (
        "2 of 119 rows are rejected, more than max_rejected=0.01 allows; first: "
        f"/data/a:b.jsonl:41: none; all of them: {rejected_file(tmp_path)}; to continue without "
        f"them: --resume {tmp_path} max_rejected=0.017"
    )
    with pytest.raises(TooManyRejectedError, match="all 3 rows are rejected; first: "):
        check(3, 3, 1.0)
