"""`selectmoe.select` on rows in memory and on files, with the embedded selector."""

import json

import pytest

import selectmoe
from selectmoe.cli.select_table import print_selection
from selectmoe.errors import ConfigError, DataError, TooManyRejectedError

ROWS = [
    {"prompt": f"What is {number} + 1?", "response": f"The sum of {number} and 1 is {number + 1}."}
    for number in range(30)
]


def test_rows_in_memory_and_the_same_rows_in_a_file_give_the_same_selection(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    from_memory = selectmoe.select(iter(ROWS), pct=0.1)
    from_file = selectmoe.select(file, pct=0.1)
    assert len(from_memory.rows) == 3
    # Ids are made from the file's name, and the order of the rows from ids.
    kept = [sorted(str(row["messages"]) for row in s.rows) for s in (from_memory, from_file)]
    assert kept[0] == kept[1]
    assert from_memory.manifest["total"]["num_read"] == 30


def test_the_files_of_a_run_stay_where_an_output_is_named(tmp_path):
    selectmoe.select(ROWS, pct=0.1, output=tmp_path / "run", rows_per_shard=10)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"selected_data.jsonl", "scored", "manifest.json"} <= names
    with pytest.raises(ConfigError, match="output must be a new or an empty folder"):
        selectmoe.select(ROWS, output=tmp_path / "run")


def test_what_cannot_be_selected_from_is_refused():
    with pytest.raises(DataError, match="the corpus has no rows"):
        selectmoe.select([])
    with pytest.raises(TooManyRejectedError, match="rows:2"):
        selectmoe.select([ROWS[0], {"prompt": "no answer"}])
    with pytest.raises(ConfigError, match="selection_percentage"):
        selectmoe.select(ROWS, pct=5)
    with pytest.raises(ConfigError, match=r"did you mean 'scoring\.dtype'"):
        selectmoe.select(ROWS, scoring__dtyp="float32")


def test_duplicates_are_told_in_table_and_manifest_and_so_is_what_a_folder_has_besides(
    tmp_path, capsys
):
    for name, rows in {"a/x.jsonl": ROWS, "b/x.json": ROWS[:10] * 2}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "notes.txt").touch()
    run = tmp_path / "elsewhere"
    for rule, num_left_out in (("drop", 20), ("keep", 0)):
        selection = selectmoe.select(
            tmp_path, pct=0.5, output=run / rule, selection__duplicates=rule
        )
        total = selection.manifest["total"]
        assert (total["num_read"], total["num_scored"]) == (50, 50 - num_left_out)
        assert (total["num_duplicates"], total["num_left_out"]) == (20, num_left_out)
        assert total["num_selected"] == len(selection.rows) == (50 - num_left_out) // 2
        datasets = selection.manifest["datasets"].values()
        assert sum(counts["num_duplicates"] for counts in datasets) == 20
        assert all(c["num_read"] == c["num_scored"] + c["num_left_out"] for c in datasets)
        print_selection(selection.manifest, run / rule)
        told = capsys.readouterr().out
        assert "20 rows have exactly the text of another row" in told
        assert ("left out; selection.duplicates=keep" in told) == (rule == "drop")
        assert {row["source"].rpartition(":")[0] for row in selection.rows} <= {
            "a/x.jsonl",
            "b/x.json",
        }
    files = selection.manifest["files"]
    assert (files["num_read"], files["num_left_over"]) == (2, 1)
    assert files["left_over"] == [str(tmp_path / "notes.txt")]
    assert files["outputs"] == [str(run / "drop"), str(run / "keep")]  # itself, too
    assert files["folders"] == [f"{tmp_path}/"]
