"""A finished run's shards, written by hand, threshold into what is kept."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.cli.select_table import print_selection
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.normalize import write_shards
from selectmoe.corpus.shards import read_shard
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.errors import TooManyRejectedError
from selectmoe.records import Message, RejectedRow, Sample
from selectmoe.scoring.calibration import describe, save_calibration
from selectmoe.selection.api import select
from selectmoe.selection.manifest import write_manifest
from selectmoe.selection.outputs import select_rows
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import SCORED_SCHEMA
from selectmoe.selection.top_k import WHOLE_CORPUS
from tests.calibrations import raw_calibration

NUM_ROWS = 40


def sample(number: int, even: str = "even") -> Sample:
    dataset = even if number % 2 == 0 else "odd"
    messages = (Message("user", f"question {number}"), Message("assistant", f"answer {number}"))
    return Sample(dataset, f"row-{number}", messages, f"corpus.jsonl:{number + 1}")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def write_run(root, even: str = "even") -> RunFolder:
    """Shards of 7 rows; row n scores (n // 4) / 100, so four rows tie; row-13 has no score.

    even: name of the dataset of the rows with even numbers.
    """
    folder = RunFolder(root)
    rejected = RejectedRow("corpus.jsonl", 41, "odd", "broken", "invalid_json", "line 41 is not")
    samples = [sample(number, even) for number in range(NUM_ROWS)]
    write_shards([*samples, rejected], folder.corpus, rows_per_shard=7)
    folder.scored.mkdir()
    for shard in folder.corpus_shards():
        rows = []
        for key, entry in read_shard(shard):
            number = int(entry.sample_id.removeprefix("row-"))
            row = {
                "row_key": key,
                "dataset": entry.dataset,
                "id": entry.sample_id,
                "source": entry.source,
            }
            if number == 13:
                row |= {"reason": "score_not_finite", "detail": "the model's score is nan"}
            else:
                row |= {
                    "score": number // 4 / 100,
                    "num_tokens": 10,
                    "num_answer_tokens": 4,
                    "truncated": number < 3,
                    "layer_scores": [0.5],
                }
            rows.append(row)
        table = pa.Table.from_pylist(rows, schema=SCORED_SCHEMA)
        pq.write_table(table, folder.scored / shard.name)
    return folder


def keep(selection_percentage: float, *, max_rejected: float = 1.0, **settings) -> SelectConfig:
    return SelectConfig(
        selection_percentage=selection_percentage, max_rejected=max_rejected, **settings
    )


def kept_ids(run: RunFolder) -> list[str]:
    lines = (run.root / "selected_data.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


def test_exactly_the_best_rows_are_kept_and_ties_are_cut(run):
    selected = select_rows(run, run, keep(0.16))
    assert selected.num_selected == 6  # floor(0.16 * 39)
    best, tied = {f"row-{n}" for n in range(36, 40)}, {f"row-{n}" for n in range(32, 36)}
    assert set(kept_ids(run)) > best
    assert len(set(kept_ids(run)) & tied) == 2


def test_the_percentage_may_count_within_each_data_set(run):
    selected = select_rows(run, run, keep(0.1, per_dataset=True))
    assert {name: counts.num_selected for name, counts in selected.counts.items()} == {
        "even": 2,  # of 20
        "odd": 1,  # of 19
    }
    assert set(selected.thresholds) == {"even", "odd"}


def test_a_dataset_that_is_named_as_the_whole_corpus_is_a_dataset_like_any_other(tmp_path, capsys):
    plain, starred = write_run(tmp_path / "plain"), write_run(tmp_path / "starred", even="*")
    expected = select_rows(plain, plain, keep(0.25, per_dataset=True))
    selected = select_rows(starred, starred, keep(0.25, per_dataset=True))
    assert selected.counts["*"] == expected.counts["even"]
    assert selected.thresholds["*"].score == expected.thresholds["even"].score
    assert kept_ids(starred) == kept_ids(plain)
    config = SelectConfig(selection_percentage=0.25, per_dataset=True)
    report = {"tokens_per_second": 1.0}
    print_selection(write_manifest(config, starred, selected, report, wall_seconds=1), starred.root)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    threshold = f"{selected.thresholds['*'].score:.4f}"
    assert ["*", "20", "20", "0", "0", "5", threshold] in rows
    assert ["all", "41", "39", "2", "0", "9"] in rows  # no threshold of the whole corpus


def test_every_row_that_was_read_is_scored_or_rejected_with_its_place_and_reason(run):
    selected = select_rows(run, run, keep(0.1))
    odd = selected.counts["odd"]
    assert (odd.num_read, odd.num_scored) == (21, 19)
    assert odd.num_rejected == {"invalid_json": 1, "score_not_finite": 1}
    assert (odd.num_tokens, odd.num_truncated) == (190, 1)
    lines = (run.root / "rejected" / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [(row["row"], row["id"], row["reason"]) for row in map(json.loads, lines)] == [
        (41, "broken", "invalid_json"),
        (14, "row-13", "score_not_finite"),
    ]


def test_a_row_is_written_as_it_was_read_with_its_score(run):
    select_rows(run, run, keep(1.0))
    rows = map(json.loads, (run.root / "selected_data.jsonl").read_text("utf-8").splitlines())
    [row] = [row for row in rows if row["id"] == "row-39"]
    assert row == {
        "dataset": "odd",
        "id": "row-39",
        "messages": [
            {"role": "user", "content": "question 39"},
            {"role": "assistant", "content": "answer 39"},
        ],
        "score": 0.09,
        "percentile": None,
        "source": "corpus.jsonl:40",
    }


def test_with_a_calibration_in_the_run_each_kept_row_has_its_percentile(run):
    calibration = raw_calibration([0.02, 0.04, 0.06, 0.095])
    save_calibration(run.root, calibration)
    selected = select_rows(run, run, keep(0.5))
    assert describe(selected.calibration) == describe(calibration)
    lines = (run.root / "selected_data.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["score"] for row in rows}) > 2
    for row in rows:  # the score as the file has it has the percentile that stands beside it
        assert row["percentile"] == calibration.percentile(row["score"])


def test_too_many_rows_without_a_score_stop_the_cut(run):
    with pytest.raises(TooManyRejectedError, match=r"2 of 41 rows are rejected.*rejected\.jsonl"):
        select_rows(run, run, keep(0.1, max_rejected=0.01))
    assert not (run.root / "selected_data.jsonl").exists()


def test_quantiles_are_upper_edges_of_narrow_bins(run):
    selected = select_rows(run, run, keep(0.1))
    # 19 of the 39 scores are at most 0.04, and 23 at most 0.05.
    assert selected.quantiles["0.5"] == pytest.approx(0.05, abs=1.1e-4)
    assert selected.thresholds[WHOLE_CORPUS].score == pytest.approx(0.09)


def test_passes_over_a_shard_at_a_time_write_the_same_file(run):
    def one_by_one(a_pass, groups):
        return (a_pass([shard]) for group in groups for shard in group)

    whole = select_rows(run, run, keep(0.4, per_dataset=True))
    expected = (run.root / "selected_data.jsonl").read_bytes()
    before = sorted(path.name for path in run.root.iterdir())
    (run.root / "pieces").mkdir()
    (run.root / "pieces" / "shard-000000.jsonl").write_text("of a killed run")
    again = select_rows(run, run, keep(0.4, per_dataset=True), map_items=one_by_one)
    assert again.counts == whole.counts
    assert (run.root / "selected_data.jsonl").read_bytes() == expected
    assert expected.count(b"\n") == whole.num_selected == 15
    assert sorted(path.name for path in run.root.iterdir()) == before  # no piece is left


def select_all(tmp_path, rows, **settings):
    """The lines of selected_data.jsonl where every row of `rows` is kept, by id."""
    select(rows, pct=1.0, output=tmp_path / "out", **settings)
    lines = (tmp_path / "out" / "selected_data.jsonl").read_text("utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


COLUMNS = ["dataset", "id", "messages", "score", "percentile", "source"]
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
RICH = {
    "id": "rich",
    "dataset": "d",
    "messages": [
        TURNS[0] | {"name": "bob"},
        TURNS[1] | {"thinking": "Hm.", "weight": 1, "at": 1.5},
    ],
    "tools": [{"name": "f"}],
    "category": "open_qa",
    "score": 0.9,
    "corpus_score": 1,
    "labels": {"de": [1, None]},
    "half an emoji": "\ud83d",
}


def test_columns_and_keys_that_nothing_reads_reach_the_selection(tmp_path):
    plain = {"id": "plain", "messages": TURNS}
    odd = {"id": "odd", "text": "Because.", "system": "linux", "day": datetime.date(2026, 1, 31)}
    rows = select_all(tmp_path, [RICH, plain, odd])
    rich = rows["rich"]
    assert list(rich)[:7] == [*COLUMNS, "tools"]
    assert rich["messages"] == RICH["messages"]
    assert rich["tools"] == RICH["tools"]
    assert {name: rich[name] for name in ("category", "labels", "half an emoji")} == {
        name: RICH[name] for name in ("category", "labels", "half an emoji")
    }
    assert (rich["corpus_corpus_score"], rich["corpus_score"]) == (0.9, 1)
    assert 0 < rich["score"] < 1
    assert list(rows["plain"]) == COLUMNS
    # As `system` a reader of the file would take it for a turn.
    assert (rows["odd"]["corpus_system"], rows["odd"]["day"]) == ("linux", "2026-01-31")


def test_columns_are_left_out_where_the_settings_say_so(tmp_path):
    rows = select_all(tmp_path, [RICH], dataset__extra_columns="drop")
    assert list(rows["rich"]) == [*COLUMNS, "tools"]
    assert rows["rich"]["messages"] == [
        TURNS[0] | {"name": "bob"},
        TURNS[1] | {"thinking": "Hm.", "weight": 1},
    ]


def test_a_selected_row_is_read_again_as_the_same_conversation(tmp_path):
    rows = select_all(tmp_path, [RICH])
    again = parse_row(rows["rich"], RowLocation("a.jsonl", 1, "a"))
    first = parse_row(RICH, RowLocation("a.jsonl", 1, "a"))
    assert (again.messages, again.tools) == (first.messages, first.tools)


def test_columns_may_have_names_of_their_own(tmp_path):
    row = {"q": "Why?", "a": "Because.", "topic": "sky"}
    [selected] = select_all(
        tmp_path, [row], dataset__columns={"prompt": "q", "response": "a"}
    ).values()
    assert selected["messages"] == TURNS
    assert selected["topic"] == "sky"
