"""report.html of trainings and comparisons: charts and tables of what their files hold."""

import json
import re

import pytest

from selectmoe.cli.report_command import report_of_stage
from selectmoe.errors import DataError
from selectmoe.report.comparison_report import write_comparison_report
from selectmoe.report.training_report import write_training_report

MANIFEST = {
    "code": {"version": "0.1.0", "commit": "abc"},
    "config": {"training.quality_loss_type": "contrastive", "model": "<b>base</b>"},
    "model": "<b>base</b>",
    "data": {"num_rows": 380, "num_tokens": 74_184, "description": "all rows of <i>corpus</i>"},
    "num_steps": 1_000,
    "num_parameters_trained": 1_032,
    "device": "cpu",
    "dtype": "float32",
    "wall_seconds": 100.7,
}


def training(folder, num_layers=16, num_lines=1_000):
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    lines = [
        {"step": step, "num_steps": num_lines, "loss": 1 / step, "label_loss": 0.5 / step}
        | {f"auroc_layer_{layer:02}": 0.5 + layer / 100 for layer in range(num_layers)}
        | ({"held_out_auroc": 0.9} if step % 500 == 0 else {})
        for step in range(1, num_lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def table_of(report, key):
    figure = report.split(f'<figure id="{key}">')[1].split("</figure>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", figure, flags=re.S)
    return [re.findall(r"<t[hd].*?>(?:<bdi>)?([^<]*)", row) for row in rows]


def test_a_warm_up_has_its_metrics_by_step_and_layer(tmp_path):
    report = write_training_report(training(tmp_path)).read_text("utf-8")
    assert "Loss 0.0010 after 1,000 steps" in report
    assert "gates were warmed up on 380 rows" in report
    header, first, *_, last = table_of(report, "loss")
    assert header == ["step", "loss", "label loss"]
    assert first == ["1", "1", "0.5"]
    assert last == ["1,000", "0.001", "0.0005"]
    layers = table_of(report, "auroc-by-layer")
    assert layers[0] == ["step", *(f"layer {number}" for number in range(16))]
    assert layers[-1][-1] == "0.65"
    assert table_of(report, "held-out-auroc")[1:] == [["500", "0.9"], ["1,000", "0.9"]]
    assert "<b>base" not in report
    assert "<i>corpus" not in report


def test_a_long_training_has_a_small_report(tmp_path):
    report = write_training_report(training(tmp_path, num_lines=5_000))
    assert report.stat().st_size < 1_000_000
    assert len(table_of(report.read_text("utf-8"), "loss")) < 70


@pytest.mark.parametrize("line", ["", '{"phase": "features", "rows": 16}\n'])
def test_a_training_without_a_step_is_complete_without_a_report(tmp_path, caplog, line):
    (training(tmp_path) / "metrics.jsonl").write_text(line)
    with pytest.raises(DataError, match="has no step"):
        write_training_report(tmp_path)
    with caplog.at_level("INFO"):
        report_of_stage(tmp_path)
    assert "no report.html" in caplog.text


def cell(value, *, difference=None):
    return {
        "value": value,
        "standard_error": 0.01,
        "num_samples": 40,
        "difference": difference and difference | {"standard_error": 0.002},
    }


def test_a_comparison_has_differences_to_the_baseline_with_intervals(tmp_path):
    better = {"value": -0.05, "paired": True}
    table = {
        "baseline": "random",
        "columns": [
            {"task": "answer_loss", "metric": "nll", "higher_is_better": False},
            {"task": "only_one", "metric": "acc", "higher_is_better": True},
        ],
        "rows": [
            {"run": "random", "folder": "/a", "cells": [cell(4.5), None]},
            {
                "run": "<selected>",
                "folder": "/b",
                "cells": [cell(4.45, difference=better), cell(1)],
            },
        ],
    }
    (tmp_path / "results_table.json").write_text(json.dumps(table))
    report = write_comparison_report(tmp_path).read_text("utf-8")
    assert "2 runs on 2 tasks" in report
    assert table_of(report, "difference-0")[1] == ["&lt;selected&gt;", "-0.0500", "0.0020", "40"]
    assert "nll, lower is better; each run minus random, sample by sample." in report
    assert [row[:2] for row in table_of(report, "task-0")[1:]] == [
        ["random", "4.5000"],
        ["&lt;selected&gt;", "4.4500"],
    ]
    assert "The dashed line is random." in report
    assert len(table_of(report, "task-1")) == 2
