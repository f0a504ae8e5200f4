"""The local HellaSwag task asks what lm-eval's own task asks."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from selectmoe.evaluation.hellaswag import clean_row, is_hellaswag
from selectmoe.evaluation.local_tasks import choices_config, plan_tasks

# Layout of the hub's rows; 'ctx' is there 'ctx_a' and 'ctx_b' joined by a blank.
RAW = [
    {
        "activity_label": "Baking", "ctx_a": "A cook lifts a tray. He turns to the oven.",
        "ctx_b": "the Cook", "endings": ["opens it.", "[substeps] eats  it."], "label": "0",
    },
    {
        "activity_label": "Home", "ctx_b": "",
        "ctx_a": "[header] How to clean [title] Use soap. [step] Soap  cleans.",
        "endings": ["Rinse it. [title] Then dry it.", " Stop."], "label": "1",
    },
]  # fmt: skip


def lm_eval_rows(rows):
    """What the function of lm-eval's task makes of the rows."""
    import datasets
    import lm_eval

    file = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "utils.py"
    spec = importlib.util.spec_from_file_location("hellaswag_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.process_docs(datasets.Dataset.from_list(rows))
    return [{"query": row["query"], "choices": row["choices"]} for row in made]


def joined(row):
    """As the files of HellaSwag that have one text before the choices."""
    context = " ".join(filter(None, (row["ctx_a"], row["ctx_b"])))
    return {
        "activity_label": row["activity_label"], "ctx": context, "choices": row["endings"],
        "answer": int(row["label"]),
    }  # fmt: skip


def test_rows_are_cleaned_as_lm_eval_cleans_them():
    expected = lm_eval_rows(RAW)
    assert expected[0]["query"] == "Baking: A cook lifts a tray. He turns to the oven. The cook"
    for make in (lambda row: row, joined):
        cleaned = [clean_row(make(row)) for row in RAW]
        assert [{key: row[key] for key in ("query", "choices")} for row in cleaned] == expected
        assert [row["answer"] for row in cleaned] == [0, 1]


def test_files_of_both_layouts_become_the_task(tmp_path):
    for number, rows in enumerate(([joined(row) for row in RAW], [hub_row(row) for row in RAW])):
        file = tmp_path / f"hellaswag{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        [task] = plan_tasks([str(file)], None)
        config = choices_config(task)
        assert (task.kind, config["doc_to_text"]) == ("choices", "{{query}}")
        assert callable(config["process_docs"])


def hub_row(row):
    return row | {"ctx": joined(row)["ctx"]}


def test_other_text_to_continue_is_asked_as_it_is(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"ctx": "See [1]. the end", "choices": ["is near.", "is far."], "answer": 0}
    file.write_text(json.dumps(row) + "\n")
    config = choices_config(plan_tasks([str(file)], None)[0])
    assert "process_docs" not in config
    assert not is_hellaswag(row)


@pytest.mark.parametrize("mark", ["[header]", "[title]", "[step]", "[substeps]"])
def test_no_mark_of_wikihow_is_left_in_the_real_rows(shared_data, mark):
    file = shared_data / "eval/hellaswag/validation_1k.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        cleaned = [clean_row(json.loads(line)) for line in lines]
    assert not any(mark in text for row in cleaned for text in (row["query"], *row["choices"]))
    assert all(row["query"].rstrip()[-1:] for row in cleaned)
