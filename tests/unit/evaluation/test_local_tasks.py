import gzip
import json
import lzma
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.loading import load_config
from selectmoe.errors import ConfigError, DataError
from selectmoe.evaluation.local_tasks import (
    absent_names,
    choices_config,
    data_files,
    nearest,
    plan_tasks,
    read_task_file,
    require_known,
    ships_with_the_package,
    with_absolute_files,
    write_for_lm_eval,
)

QUESTION = {"question": "Which is hot?", "choices": ["fire", "ice"], "answer": 0}
CONTINUED = {"ctx": "She opens the", "choices": ["door.", "sky."], "answer": 0}
LETTERED = {**QUESTION, "subject": "sense", "choices": ["fire", "ice", "snow", "frost"]}
CONVERSATION = {"prompt": "Why?", "response": "Because."}


def write_rows(file, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return str(file)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_file_of_choices_is_a_task_named_by_its_folder_and_file(tmp_path, ending):
    file = write_rows(tmp_path / "arc_easy" / f"test{ending}", QUESTION, QUESTION)
    [task] = plan_tasks([file], None)
    assert (task.name, task.kind, str(task.file)) == ("arc_easy_test", "choices", file)
    config = choices_config(task)
    assert config["task"] == "arc_easy_test"
    assert config["dataset_kwargs"] == {"data_files": {"test": file}}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (QUESTION, "Question: {{question}}\nAnswer:"),
        (CONTINUED, "{% if activity_label %}{{activity_label}}: {% endif %}{{ctx}}"),
        (LETTERED, "D. {{choices[3]}}\nAnswer:"),
    ],
)
def test_the_prompt_goes_by_the_columns_of_the_rows(tmp_path, row, prompt):
    [task] = plan_tasks([write_rows(tmp_path / "rows.jsonl", row)], None)
    assert choices_config(task)["doc_to_text"].endswith(prompt)


def test_letters_need_four_choices_in_every_row(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", LETTERED, {**LETTERED, "choices": ["a", "b"]})
    [task] = plan_tasks([file], None)
    assert choices_config(task)["doc_to_text"].startswith("Question:")


def test_a_file_of_conversations_is_asked_for_the_loss_on_its_answers(tmp_path):
    [task] = plan_tasks([write_rows(tmp_path / "x" / "held.jsonl", CONVERSATION)], None)
    assert (task.name, task.kind) == ("x_held", "answer_loss")


def test_names_are_left_to_lm_eval_unless_the_package_ships_them():
    loss, choices, other = plan_tasks(["demo_answer_loss", "demo_choices", "mmlu"], None)
    assert (loss.kind, choices.kind, other.kind) == ("answer_loss", "by_name", "by_name")
    assert list(map(ships_with_the_package, (loss, choices, other))) == [True, True, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**QUESTION, "answer": 2}, "'answer' must be the number of a choice, 0 to 1, got int 2"),
        ({**QUESTION, "answer": "0"}, "'answer' must be the number of a choice"),
        ({**QUESTION, "answer": True}, "'answer' must be the number of a choice"),
        ({**QUESTION, "choices": ["fire"]}, "'choices' must be a list of at least 2"),
        ({**QUESTION, "choices": ["fire", " "]}, "every choice must be text, got str ' '"),
        ({"choices": ["a", "b"], "answer": 0}, "'question' or 'ctx' must be text"),
        ([QUESTION], "a row must be a JSON object, got list"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, message):
    file = write_rows(tmp_path / "rows.jsonl", QUESTION, row)
    with pytest.raises(DataError) as raised:
        plan_tasks([file], None)
    assert str(raised.value).startswith(f"{file}:2: {message}")


def test_a_malformed_conversation_is_named_by_file_and_line(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", CONVERSATION, {"messages": []})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'messages' must not be empty"):
        plan_tasks([file], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no rows"),
        (b"\n\n", "contains no rows"),
        (b"{", ":1: line 1 is not valid JSON"),
        (b"\xff\n", ":1: line 1 is not valid UTF-8"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        plan_tasks([str(file)], None)


@pytest.mark.parametrize("rows", [[QUESTION, LETTERED], [CONVERSATION] * 2])
def test_a_file_is_read_as_a_corpus_is_and_handed_to_lm_eval_in_plain_lines(tmp_path, rows):
    mark = b"\xef\xbb\xbf"
    copies = tmp_path / "copies"
    copies.mkdir()
    lines = [json.dumps(row).encode() for row in rows]
    for name, content in {
        "a.jsonl": mark + lines[0] + b"\r\n" + mark + lines[1] + b"\n" + mark,
        "b.json": json.dumps(rows, indent=2).encode(),
        "c.NDJSON.xz": lzma.compress(b"\n".join(lines)),
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        [task] = plan_tasks([str(file)], None)
        assert task.kind == ("choices" if "choices" in rows[0] else "answer_loss")
        assert task.name == f"{tmp_path.name}_{name[0]}"
        copied = write_for_lm_eval(file, copies).read_text().splitlines()
        assert [json.loads(line) for line in copied] == rows


def test_a_table_in_text_has_its_choices_as_json(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('question,choices,answer\nWhy?,"[""So."", ""No.""]",1\n')
    [task] = plan_tasks([str(table)], None)
    assert task.kind == "choices"
    copy = write_for_lm_eval(task.file, tmp_path)
    [row] = map(json.loads, copy.read_text().splitlines())
    assert (row["choices"], row["answer"]) == (["So.", "No."], 1)


def test_a_file_that_is_not_gzip_after_all_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot be read to its end: Not a gzipped file"):
        plan_tasks([str(file)], None)


def test_a_missing_file_and_a_task_asked_for_twice_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"file .*gone\.jsonl does not exist"):
        plan_tasks([str(tmp_path / "gone.jsonl")], None)
    with pytest.raises(ConfigError, match="got 'mmlu' twice"):
        plan_tasks(["mmlu", "mmlu"], None)


def test_data_files_of_a_task_file_are_found_from_its_own_folder(tmp_path):
    config = {
        "task": "t",
        "dataset_kwargs": {"data_files": {"test": "r.jsonl", "dev": ["a/b.csv"]}},
    }
    found = with_absolute_files(config, tmp_path)["dataset_kwargs"]["data_files"]
    assert found == {"test": str(tmp_path / "r.jsonl"), "dev": [str(tmp_path / "a/b.csv")]}
    url = {"dataset_kwargs": {"data_files": "https://host/r.jsonl"}}
    assert with_absolute_files(url, tmp_path) == url
    with pytest.raises(ConfigError, match=r"task t: its data file .*r\.jsonl does not exist"):
        data_files(config, tmp_path)


def test_rows_of_a_task_file_are_read_before_any_model_is(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\nprocess_docs: !function mine.rows\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl}}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnot JSON\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: line 2 is not valid JSON"):
        plan_tasks(["mine"], str(tmp_path))
    assert plan_tasks(["demo_choices"], str(tmp_path))[0].name == "demo_choices"


@pytest.mark.parametrize("text", ["task: [", "- a list"])
def test_a_broken_task_file_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml(: a task file must| is not a task)"):
        read_task_file(tmp_path / "broken.yaml")


def test_tasks_dir_must_be_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="tasks_dir must be a folder"):
        plan_tasks(["demo_choices"], str(tmp_path / "gone"))


def test_the_nearest_name_is_suggested():
    assert nearest("hellasweg", ["arc_easy", "hellaswag"]) == "; did you mean 'hellaswag'?"
    assert nearest("x", []) == ""


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


def test_choices_by_the_hubs_names_are_read_also_where_a_row_has_a_subject(tmp_path):
    row = {"question": "Which?", "subject": "sea", "endings": ["a", "b"], "label": "1"}
    file = write_rows(tmp_path / "hub.jsonl", row)
    [task] = plan_tasks([file], None)
    assert choices_config(task)["task"] == task.name
    copy = write_for_lm_eval(tmp_path / "hub.jsonl", make_folder(tmp_path / "copy"))
    [written] = map(json.loads, copy.read_text("utf-8").splitlines())
    assert (written["choices"], written["answer"]) == (["a", "b"], 1)


def make_folder(folder):
    folder.mkdir()
    return folder
