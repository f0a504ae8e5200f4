"""The table of bench_quality.py, on a few rows of the demo corpus."""

from argparse import Namespace

import pytest

from benchmarks.bench_quality import COLUMNS, Extent, format_table, measure
from benchmarks.quality_rows import Sizes
from benchmarks.quality_scorers import SCORERS
from benchmarks.quality_warmups import LEFT_OUT
from benchmarks.quality_worth import WorthSettings
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.paths import EMBEDDED_SELECTOR

TINY = Extent(
    sizes=Sizes(num_per_family=3, num_held_out=4, num_training=16, num_pool=16),
    worth=WorthSettings(
        fractions=(0.25,),
        only={0.25: ("gate",)},
        seeds=(0,),
        overrides=("preset=tiny", "training.num_epochs=1"),
    ),
)
# Four finetuning runs, all short: 20 s of CPU.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def measured():
    args = Namespace(
        scorers=SCORERS, quick=True, data=None, selector=EMBEDDED_SELECTOR, seed=1, workers=1
    )
    return measure(args, TINY)


@pytest.fixture(scope="module")
def by_scorer(measured):
    return {row["scorer"]: row for row in measured["scorers"]}


def test_the_embedded_gate_ranks_originals_above_copies_better_than_an_untrained_one(by_scorer):
    gate, untrained, chance = (by_scorer[n] for n in ("gate", "untrained gate", "random"))
    # With three rows and their copies, chance is within .2 of .5.
    assert gate["seen"] > 0.75
    assert gate["seen"] > untrained["seen"] + 0.1
    assert chance["seen"] == pytest.approx(0.5, abs=0.2)


def test_only_gate_and_probe_are_evaluated_on_left_out_kinds(by_scorer):
    known = {kind for group in LEFT_OUT.values() for kind in group}
    assert known == set(CORRUPTIONS)
    for name, row in by_scorer.items():
        learns = name in ("gate", "linear probe")
        assert (row["left_out"] is not None) == learns
        if learns:
            assert row["by_kind"]["left_out"].keys() == row["by_kind"]["seen"].keys()


def test_every_selection_is_compared_with_random(measured):
    for part in ("worth", "worth_corrupted"):
        rows = {row["scorer"]: row for row in measured[part]}
        assert rows.keys() == {"gate", "random", "no finetuning"}
        assert rows["random"]["difference"] is None
        assert all(row["loss"] > 0 for row in rows.values())
        assert isinstance(rows["gate"]["difference"], float)
    assert {row["scorer"]: row for row in measured["worth_corrupted"]}["random"][
        "corrupted_share"
    ] == pytest.approx(0.3, abs=0.3)


def test_the_table_has_a_line_per_scorer_and_a_cell_per_metric(measured):
    lines = format_table(measured).splitlines()
    assert len(lines) == 2 + len(SCORERS) + 2
    assert all(line.count("|") == len(COLUMNS) + 2 for line in lines[: 2 + len(SCORERS)])
    assert lines[2].startswith("| gate | 0.") or lines[2].startswith("| gate | 1.")
    assert lines[-1].startswith("lowest rank correlation of two warm-ups: ")
