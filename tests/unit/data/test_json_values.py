"""The values of a .json file: elements of an array, objects over lines, and broken files."""

import json
import random
import tracemalloc

import pytest

from selectmoe.data.json_values import split_values
from selectmoe.data.readers import read_corpus
from tests.corpus_files import ids, jsonl, refusal, write

LETTERS = 'a"\\,[]{}\n é'


def made_value(draw: random.Random, depth: int = 0) -> object:
    """Any value of JSON, whose texts are full of what separates values."""
    text = "".join(draw.choices(LETTERS, k=draw.randrange(6)))
    if depth == 3 or draw.random() < 0.4:
        return draw.choice([None, True, -1.5e3, text])
    inner = [made_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return inner if draw.random() < 0.5 else {f"{n}{text}": one for n, one in enumerate(inner)}


def in_chunks(text: str, size: int) -> list[bytes]:
    content = text.encode()
    return [content[start : start + size] for start in range(0, len(content), size)]


def values_of(text: str, size: int) -> list[object]:
    return [json.loads(value) for value, _ in split_values(in_chunks(text, size), 10**6, "f")]


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_values_are_found_wherever_the_chunks_end(size):
    draw = random.Random(size)
    for indent in [None, 1] * 20:
        values = [made_value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(values, indent=indent, ensure_ascii=indent is None)
        assert values_of(text, size) == values
        objects = [{"key": value} for value in values]
        text = "\n".join(json.dumps(value, indent=2) for value in objects)
        assert values_of(text, size) == objects


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


def test_an_element_over_the_limit_is_rejected_without_being_held(tmp_path):
    rows = [{"id": n, "text": "x\\" * size} for n, size in (("a", 9), ("b", 8 << 20), ("c", 9))]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1).encode())
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
    assert "got 25,1" in row.detail
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
