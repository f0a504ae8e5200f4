import json
import math

import numpy as np
import pytest

from selectmoe.errors import ConfigError, DataError
from selectmoe.evaluation.results_table import (
    compare_runs,
    difference,
    to_markdown,
    to_text,
    write_table,
)
from selectmoe.evaluation.run_files import EvaluationRun, read_run, write_run
from selectmoe.evaluation.task_results import MetricValue, SampleValues, TaskResult, aggregate

RIGHT_RANDOM = [1, 0, 0, 1, 0, 1, 0, 0]
RIGHT_SELECTED = [1, 1, 0, 1, 0, 1, 1, 0]


def choices(right, task="choices", subtasks=()):
    samples = tuple(SampleValues(f"{n}:hash", {"acc": float(v)}) for n, v in enumerate(right))
    metric = aggregate(samples, "acc", higher_is_better=True)
    return TaskResult(task, {"acc": metric}, len(right), subtasks=subtasks, samples=samples)


def loss(values, weights):
    samples = tuple(
        SampleValues(f"{n}:hash", {"nll_per_token": v}, {"nll_per_token": w})
        for n, (v, w) in enumerate(zip(values, weights, strict=True))
    )
    metric = aggregate(samples, "nll_per_token", higher_is_better=False)
    return TaskResult("loss", {"nll_per_token": metric}, len(values), samples=samples)


def run(folder, name, *results):
    write_run(folder, name=name, about={"model": "m", "adapter": None}, results=results)
    return read_run(folder)


@pytest.fixture
def runs(tmp_path):
    found = []
    for name, right, values in (
        ("base", [0] * 8, [4.0, 5.0, 3.0]),
        ("random", RIGHT_RANDOM, [3.0, 4.0, 2.5]),
        ("selected", RIGHT_SELECTED, [2.5, 3.9, 2.0]),
    ):
        (tmp_path / name).mkdir()
        found.append(run(tmp_path / name, name, choices(right), loss(values, [10, 40, 20])))
    return found


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    result = TaskResult(
        "t", {"acc": MetricValue(0.5, None, True)}, 2, {"too_long": 1}, 3, 5, "1.0", ("a",),
        (SampleValues("0:x", {"acc": 1.0}, {"acc": 2.0}, {"target": 1}),), 1.5,
    )  # fmt: skip
    assert run(tmp_path, "mine", result) == EvaluationRun("mine", tmp_path, "m", None, (result,))


def test_the_difference_is_taken_sample_by_sample(runs):
    _, random, selected = runs
    found = difference(selected, random, "choices", "acc")
    apart = np.subtract(RIGHT_SELECTED, RIGHT_RANDOM)
    assert found.paired
    assert found.value == pytest.approx(0.25)
    assert found.standard_error == pytest.approx(apart.std(ddof=1) / math.sqrt(8))
    errors = [each.result("choices").metrics["acc"].standard_error for each in (selected, random)]
    assert found.standard_error < math.hypot(*errors)  # what is hard for both cancels out


def test_a_difference_of_means_over_tokens_is_paired_too(runs):
    _, random, selected = runs
    found = difference(selected, random, "loss", "nll_per_token")
    assert found.paired
    assert found.value == pytest.approx(-(10 * 0.5 + 40 * 0.1 + 20 * 0.5) / 70)
    pulls = np.array([10 * -0.5, 40 * -0.1, 20 * -0.5]) - found.value * np.array([10, 40, 20])
    expected = math.sqrt(((pulls / (70 / 3)) ** 2).sum() / 2 / 3)
    assert found.standard_error == pytest.approx(expected)


def test_other_samples_are_not_paired(runs, tmp_path):
    _, random, _ = runs
    (tmp_path / "short").mkdir()
    short = run(tmp_path / "short", "short", choices(RIGHT_SELECTED[:5]))
    found = difference(short, random, "choices", "acc")
    errors = [each.result("choices").metrics["acc"].standard_error for each in (short, random)]
    assert not found.paired
    assert found.standard_error == pytest.approx(math.hypot(*errors))
    assert "unpaired" in to_text(compare_runs([random, short], baseline="random"))


def test_a_metric_that_is_no_mean_over_samples_is_not_paired(tmp_path):
    """Perplexity is a function of the mean; the mean of what samples store is another number."""
    made = []
    for name in ("random", "selected"):
        (tmp_path / name).mkdir()
        samples = tuple(SampleValues(str(n), {"perplexity": -2.0}) for n in range(3))
        result = TaskResult("p", {"perplexity": MetricValue(7.4, 0.3, False)}, 3, samples=samples)
        made.append(run(tmp_path / name, name, result))
    assert not difference(made[1], made[0], "p", "perplexity").paired


def test_a_group_is_one_column_and_paired_over_all_that_is_in_it(tmp_path):
    made = []
    for name, right in (("random", RIGHT_RANDOM), ("selected", RIGHT_SELECTED)):
        (tmp_path / name).mkdir()
        parts = [choices(right[:5], "first"), choices(right[5:], "second")]
        whole = MetricValue(sum(right) / 8, 0.17, True)
        group = TaskResult("group", {"acc": whole}, 8, subtasks=("first", "second"))
        made.append(run(tmp_path / name, name, *parts, group))
    table = compare_runs(made, baseline="random")
    assert [column.task for column in table.columns] == ["group"]
    assert table.rows["selected"][0].difference.paired
    assert table.rows["selected"][0].difference.value == pytest.approx(0.25)


def test_a_group_without_a_number_leaves_the_columns_to_its_tasks(tmp_path):
    group = TaskResult("group", {}, 0, subtasks=("first",))
    made = run(tmp_path, "random", choices(RIGHT_RANDOM, "first"), group)
    assert [column.task for column in compare_runs([made], baseline="x").columns] == ["first"]


def test_the_table_has_a_row_a_run_and_differences_to_the_baseline_alone(runs):
    table = compare_runs(runs, baseline="random")
    assert list(table.rows) == ["base", "random", "selected"]
    assert all(cell.difference is None for cell in table.rows["random"])
    lines = to_text(table).splitlines()
    assert lines[0].split() == ["run", "choices", "acc", "loss", "nll_per_token"]
    assert "0.6250 ± 0.1830 (+0.2500 ± 0.1637)" in lines[3]
    assert lines[-1].endswith("paired difference to random; lower is better for loss.")


def test_without_a_run_of_that_name_there_are_no_differences(runs):
    table = compare_runs(runs, baseline="full")
    assert table.baseline is None
    assert all(cell.difference is None for cells in table.rows.values() for cell in cells)
    assert "difference" not in to_text(table)


def test_a_task_that_a_run_has_not_done_is_a_dash(runs, tmp_path):
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other", "other", choices(RIGHT_RANDOM, "more"))
    table = compare_runs([*runs, other], baseline="random")
    assert [cell is None for cell in table.rows["other"]] == [True, True, False]
    assert to_text(table).splitlines()[4].split()[:3] == ["other", "-", "-"]


def test_the_table_is_stored_for_programs_and_for_people(runs, tmp_path):
    table = compare_runs(runs, baseline="random")
    as_json, as_markdown = write_table(table, tmp_path)
    content = json.loads(as_json.read_text())
    assert content["rows"][2]["run"] == "selected"
    assert content["rows"][2]["cells"][0]["difference"]["paired"] is True
    text = as_markdown.read_text()
    assert text == to_markdown(table)
    assert text.splitlines()[1] == "| --- | --- | --- |"


def test_two_runs_of_one_name_are_refused_with_their_folders(runs):
    with pytest.raises(ConfigError, match=r"got 'base' for .*base, .*base"):
        compare_runs([runs[0], runs[0]], baseline="random")


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is not a finished evaluation run: it has no results\.json"
    ):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read its evaluation results"):
        read_run(tmp_path)


def test_a_number_that_json_lacks_leaves_no_file(tmp_path):
    broken = TaskResult("t", {"acc": MetricValue(math.nan, None, True)}, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_run(tmp_path, name="n", about={}, results=[broken])
    assert not (tmp_path / "results.json").exists()
