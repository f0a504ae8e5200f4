"""Names in lm-eval's installed files, without its index: that takes the integration tests."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.loading import load_config
from selectmoe.evaluation.local_tasks import plan_tasks
from selectmoe.evaluation.task_names import absent_names, require_known


@pytest.fixture
def lm_eval_tasks():
    return Path(find_spec("lm_eval").origin).parent / "tasks"


def test_tasks_groups_tags_and_names_in_templates_are_found(lm_eval_tasks):
    preset = load_config(EvaluateConfig, ["preset=benchmarks"])
    names = {*preset.tasks, "mmlu", "bbh", "mmlu_stem", "arc_easy", "leaderboard", "acp_bench"}
    assert absent_names(names, lm_eval_tasks) == set()


def test_a_name_that_is_only_part_of_another_is_none(lm_eval_tasks):
    assert absent_names({"mml", "ellaswag", "hellaswag"}, lm_eval_tasks) == {"mml", "ellaswag"}


def test_good_names_and_those_of_ones_own_files_do_without_lm_eval(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("task: only_mine\ntag: [all_of_mine]\n")
    names = ["demo_choices", "demo_answer_loss", "arc_easy", "only_mine", "all_of_mine"]
    monkeypatch.setitem(sys.modules, "selectmoe.evaluation.lm_eval_run", None)  # no import of it
    require_known(plan_tasks(names, str(tmp_path)), str(tmp_path))
    with pytest.raises(ImportError):  # whereas this name is for its index to judge
        require_known(plan_tasks(["helaswag"], None), None)
