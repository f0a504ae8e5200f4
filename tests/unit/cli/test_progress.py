"""Progress lines of a selection."""

import time

import pytest

from selectmoe.cli import progress
from selectmoe.cli.progress import SelectionProgress


@pytest.fixture
def without_pauses(monkeypatch):
    """Lines as often as they are shown, and soon."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOG_LINES", 0.0)
    monkeypatch.setattr(progress, "SECONDS_UNTIL_TOLD", 0.01)


def test_a_first_shard_that_takes_long_is_told(without_pauses, capsys):
    lines = SelectionProgress()
    lines.scoring_started(num_rows=1_000, num_rows_done=0)
    time.sleep(0.2)
    lines.close()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == (
        "scoring: 0 of 1,000 rows after 0 s; rows are counted when their shard is finished"
    )


def test_nothing_is_told_after_the_end(without_pauses, capsys):
    lines = SelectionProgress()
    lines.scoring_started(num_rows=10, num_rows_done=0)
    lines.shard_scored(10, 400)
    lines.close()
    time.sleep(0.05)  # a line that was begun before may still end
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
