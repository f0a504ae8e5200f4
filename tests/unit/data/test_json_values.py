"""The values of a .json file: elements of an array, objects over lines, and broken files."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe.data.json_values import split_values
from selectmoe.data.readers import read_corpus
from tests.corpus_files import ids, jsonl, refusal, write

_JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a"\\,[]{}\n é')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(_JSON, max_size=6), st.integers(1, 30), st.sampled_from([None, 1]))
def test_elements_are_found_wherever_the_chunks_end(values, size, indent):
    text = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert [json.loads(value) for value, _ in split_values(chunks, 10**6, "f")] == values


@given(st.lists(st.dictionaries(st.text(max_size=3), _JSON), max_size=5), st.integers(1, 30))
def test_objects_over_several_lines_follow_each_other(values, size):
    text = "\n".join(json.dumps(value, indent=2) for value in values).encode()
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert [json.loads(value) for value, _ in split_values(chunks, 10**6, "f")] == values


def test_a_json_file_may_hold_an_array_or_lines_or_indented_objects(tmp_path):
    rows = [{"id": name, "text": "Because."} for name in "ab"]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=4),
        "\n\n" + json.dumps(rows),
        "".join(json.dumps(row) + "\n" for row in rows),
        "\n".join(json.dumps(row, indent=2) for row in rows),
    ):
        assert ids(write(tmp_path / "a.json", text.encode())) == ["a", "b"]
    assert ids(write(tmp_path / "a.json", json.dumps(rows[0], indent=2).encode())) == ["a"]
    assert "no rows" in refusal(write(tmp_path / "a.json", b" [ ]\n"))


def test_a_bad_element_is_rejected_and_its_neighbours_are_read(tmp_path):
    text = b'[{"id": 1, "text": "a"}, {"text": nul}, 7, {"text": "\xe9"}, {"id": 5, "text": "b"}]'
    rows = list(read_corpus(str(write(tmp_path / "a.json", text))))
    assert [getattr(row, "reason", "") for row in rows] == [
        "", "invalid_json", "not_an_object", "invalid_utf8", ""
    ]  # fmt: skip
    assert rows[1].detail == "row 2 is not valid JSON: Expecting value, at column 10"
    assert rows[4].source == f"{tmp_path}/a.json:5"


def test_lines_of_a_json_file_are_rejected_as_those_of_a_jsonl_file(tmp_path):
    path = write(tmp_path / "a.json", jsonl("1") + b'{"text": "a"\n' + jsonl("3"))
    before, row, after = read_corpus(str(path))
    assert (before.sample_id, row.row, row.reason, after.sample_id) == ("1", 2, "invalid_json", "3")


@pytest.mark.parametrize("indent", [None, 1])
def test_an_element_over_the_limit_is_rejected_without_being_held(tmp_path, indent):
    rows = [{"id": n, "text": "x" * size} for n, size in (("a", 9), ("b", 64 << 20), ("c", 9))]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=indent).encode())
    tracemalloc.start()
    before, row, after = read_corpus(str(path), max_row_bytes=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (before.sample_id, row.row, row.reason, after.sample_id) == (
        "a",
        2,
        "row_too_large",
        "c",
    )
    assert "got 67,10" in row.detail
    assert peak < 8 << 20


def test_a_file_that_ends_too_early_or_too_late_is_refused(tmp_path):
    for text, complaint in {
        b'[{"id": 1, "text": "a"}': "its array is not closed",
        b'[{"id": 1, "text": "a': "its array is not closed",
        b'{\n"text": "a"': "its object is not closed",
        b'[{"text": "a"}] {"text": "b"}': "there is text after the end of its array",
        b'[{"text": "a"}] x': "there is text after the end of its array",
    }.items():
        assert complaint in refusal(write(tmp_path / "a.json", text))
