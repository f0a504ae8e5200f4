"""Re-selecting from stored scores by another strategy, as a user types it; no model is loaded."""

import json
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from selectmoe.cli import select_command
from selectmoe.errors import ConfigError, ResumeError
from tests.selection_run import finished_run, sample

NUM_ROWS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Scores rise with the number of the row, answers with its remainder by 7."""
    rows = [
        sample(number, "word " * (number % 7 + 1), dataset="ab"[number % 2])
        for number in range(NUM_ROWS)
    ]
    scores = [(number + 1) / (NUM_ROWS + 1) for number in range(NUM_ROWS)]
    return finished_run(tmp_path_factory.mktemp("selection") / "run", rows, scores)


@pytest.fixture
def select(run, tmp_path, capsys):
    """Runs the command; gives the manifest, the numbers of the kept rows, and what it printed."""

    def select(*arguments: str, name: str = "again") -> tuple[dict, list[int], str]:
        output = tmp_path / name
        given = ["--scored", str(run.root), "--output", str(output), *arguments, "report=rows"]
        select_command.main(given)
        lines = (output / "selected_data.jsonl").read_text("utf-8").splitlines()
        ids = [int(json.loads(line)["id"].removeprefix("row-")) for line in lines]
        return json.loads((output / "manifest.json").read_text()), ids, capsys.readouterr().out

    return select


def report_sentence(tmp_path, name: str = "again") -> str:
    page = (tmp_path / name / "report.html").read_text("utf-8")
    return re.search(r'<p class="lead">(.*?)</p>', page)[1]


def test_a_sample_is_named_in_manifest_table_and_report(select, tmp_path):
    manifest, ids, printed = select(
        "--strategy", "sampled", "--rows", "9", "selection.floor=0.3", "selection.seed=4"
    )
    assert len(ids) == 9
    assert min(ids) >= 18  # 30 % of 60 rows
    selection = manifest["selection"]
    assert selection["strategy"] == "sampled"
    assert (selection["temperature"], selection["seed"], selection["floor"]) == (1.0, 4, 0.3)
    assert selection["budget"] == {"unit": "rows", "amount": 9}
    assert selection["floor_thresholds"]["*"]["num_kept"] == 42
    assert selection["floor_thresholds"]["*"]["score"] == pytest.approx(19 / 61)
    assert selection["fates"] == {
        "kept": 9,
        "below_floor": 18,
        "outranked": 33,
        "over_token_budget": 0,
        "over_dataset_maximum": 0,
        "duplicate": 0,
        "rejected": 0,
    }
    assert list(manifest["thresholds"]["*"]) == ["sampling_key", "row_key", "num_kept"]
    rule = (
        "A random sample of 9 rows of the corpus that prefers high gate scores (temperature 1.0, "
        "seed 4), without the worst 30 % by gate score"
    )
    assert rule in printed
    assert "threshold" not in printed
    assert report_sentence(tmp_path) == f"{rule}: 9 of 60 scored rows are kept."
    page = (tmp_path / "again" / "report.html").read_text("utf-8")
    assert "threshold" not in page
    # Its figures count the rows that the run has kept.
    figure = page.split('<figure id="scores">')[1].split("</figure>")[0]
    cells = re.findall(r"<tr>.*?<td>([\d,]+)</td><td>([\d,]+)</td></tr>", figure)
    assert sum(int(kept) for _, kept in cells) == 9
    command = re.search(r"<pre tabindex=\"0\">selectmoe select (.*?)</pre>", page)[1].split()
    again = select_command.parse([*command, f"output={tmp_path}"], prog="selectmoe select")
    assert (again.selection.rows, again.selection_percentage) == (9, None)
    assert (again.selection.strategy, again.selection.seed) == ("sampled", 4)


def test_the_same_command_keeps_the_same_rows_and_another_seed_others(select):
    arguments = ("--strategy", "random", "--pct", "0.2")
    _, first, _ = select(*arguments, name="first")
    _, again, _ = select(*arguments, name="second")
    _, other, _ = select(*arguments, "selection.seed=1", name="third")
    assert first == again
    assert len(other) == len(first) == 12
    assert first != other


def test_a_token_budget_is_filled_by_whole_rows(select, tmp_path):
    manifest, ids, printed = select("--strategy", "longest", "--tokens", "24")
    assert {number % 7 for number in ids} == {6}  # seven tokens each: a fourth row exceeds 24
    assert len(ids) == 3
    assert manifest["selection"]["num_answer_tokens"]["selected"] == 21
    assert manifest["selection"]["fates"]["over_token_budget"] == 57
    rule = "The rows of the corpus with the longest answers, at most 24 answer tokens"
    assert rule in printed
    assert report_sentence(tmp_path) == f"{rule}: 3 of 60 scored rows are kept."


def test_thresholds_are_by_dataset_where_datasets_have_limits(select, tmp_path):
    manifest, ids, printed = select("--pct", "0.2", "selection.max_per_dataset=5")
    assert ids  # in the order of row keys
    assert sorted(ids) == [*range(50, 60)]
    assert set(manifest["thresholds"]) == {"a", "b"}
    assert "warning: selection.max_per_dataset=5 leaves 10 rows of 12 to keep" in printed
    assert "at most 5 rows of a dataset" in report_sentence(tmp_path)
    rows = [line.split() for line in printed.splitlines()]
    assert ["a", "30", "30", "0", "0", "5", f"{51 / 61:.4f}"] in rows


def test_the_best_rows_above_a_floor_still_have_a_threshold(select, tmp_path):
    manifest, _, printed = select("--pct", "0.1", "selection.floor=0.5")
    assert manifest["thresholds"]["*"]["score"] == pytest.approx(55 / 61)
    assert "threshold" in printed
    assert report_sentence(tmp_path) == (
        "The best 10 % of the corpus by gate score, without the worst 50 % by gate score: "
        f"6 of 60 scored rows are kept, from score {55 / 61:.4f} upwards."
    )


def test_every_row_has_a_fate_in_a_file_beside_its_scores(select, run, tmp_path):
    manifest, ids, _ = select(
        "--strategy", "sampled", "--pct", "0.2", "selection.floor=0.3", "selection.write_fates=true"
    )
    counts: Counter[str] = Counter()
    for shard in run.scored_shards():
        scored = pq.read_table(shard)
        fates = pq.read_table(tmp_path / "again" / "fates" / shard.name)["fate"].to_pylist()
        for row_id, fate in zip(scored["id"].to_pylist(), fates, strict=True):
            assert (fate == "kept") == (int(row_id.removeprefix("row-")) in ids)
            counts[fate] += 1
    assert counts == {name: n for name, n in manifest["selection"]["fates"].items() if n}
    assert counts["below_floor"] == 18


def test_a_budget_that_the_scores_refuse_may_be_changed_by_resuming(run, tmp_path, capsys):
    output = tmp_path / "scored"  # as a folder of scores is named
    arguments = ["--scored", str(run.root), "--output", str(output), "report=none"]
    with pytest.raises(ConfigError, match="at least 4, the answer tokens of the first row, got 1"):
        select_command.main([*arguments, "--tokens", "1"])
    select_command.main(["--resume", str(output), "--tokens", "24"])
    assert (output / "manifest.json").is_file()
    with pytest.raises(ResumeError, match=r"selection\.tokens is 24 there and 25 here"):
        select_command.main(["--resume", str(output), "--tokens", "25"])
    parsed = select_command.parse(["--scored", str(output)], prog="selectmoe select")
    assert parsed.scored == str(output)


def test_two_budgets_are_refused_before_anything_is_written(run, tmp_path):
    arguments = ["--scored", str(run.root), "--output", str(tmp_path / "x")]
    with pytest.raises(ConfigError, match=r"\(--rows\)=5 and selection\.tokens \(--tokens\)=9"):
        select_command.main([*arguments, "--rows", "5", "--tokens", "9"])
    with pytest.raises(ConfigError, match=r"\(--pct\)=0\.1 and selection\.rows \(--rows\)=5"):
        select_command.main([*arguments, "--pct", "0.1", "--rows", "5"])
    assert not (tmp_path / "x").exists()
