"""`selectmoe.select` on rows in memory and on files, with the embedded selector."""

import json

import pytest

import selectmoe
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
