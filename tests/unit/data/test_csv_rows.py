"""Tables in text: cells, rows that are no rows, and headers."""

import pytest

from selectmoe.data.readers import read_corpus
from tests.corpus_files import ids, refusal, write


def rows_of(tmp_path, text: str | bytes, name: str = "a.csv", **settings: int):
    content = text if isinstance(text, bytes) else text.encode()
    return list(read_corpus(str(write(tmp_path / name, content)), **settings))


def test_a_cell_may_hold_quotes_commas_and_lines_and_a_row_has_the_number_of_its_line(tmp_path):
    text = 'prompt,response\n"a ""b"", c\nd",e\n\nf,g\n'
    first, second = rows_of(tmp_path, text)
    assert [m.content for m in first.messages] == ['a "b", c\nd', "e"]
    assert (first.sample_id, second.sample_id) == ("a.csv:2", "a.csv:5")


def test_an_empty_cell_is_no_value(tmp_path):
    text = "id,instruction,input,output\n,a,,b\n2,a,c,b\n3,a,c,\n"
    first, second, third = rows_of(tmp_path, text)
    assert (first.sample_id, first.messages[0].content) == ("a.csv:2", "a")
    assert second.messages[0].content == "a\n\nc"
    assert (third.row, third.sample_id) == (4, "3")
    assert "'output' must be text, got NoneType None" in third.detail


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"b", "wrong_number_of_columns", "row at line 3 must have 2 columns, got 1"),
        (b"b,c,d", "wrong_number_of_columns", "row at line 3 must have 2 columns, got 3"),
        (b'b,"c"d', "invalid_csv", "row at line 3 is not valid CSV: ',' expected after '\"'"),
        (b"b,caf\xe9", "invalid_utf8", "row at line 3 is not valid UTF-8"),
    ],
)
def test_a_bad_row_is_rejected_and_its_neighbours_are_read(tmp_path, line, reason, detail):
    before, row, after = rows_of(tmp_path, b"id,text\na,x\n" + line + b"\nc,x\n")
    assert (before.sample_id, after.sample_id) == ("a", "c")
    assert (row.row, row.reason, row.dataset) == (3, reason, "a")
    assert detail in row.detail


def test_a_quotation_mark_that_is_not_closed_is_told(tmp_path):
    first, second = rows_of(tmp_path, 'id,text\na,x\nb,"y\nc,z\n')
    assert (first.sample_id, second.row, second.reason) == ("a", 3, "invalid_csv")


def test_a_row_over_the_limit_is_rejected(tmp_path):
    text = f"id,text\na,{'x' * 90}\nb,{'x' * 300_000}\nc,x\n"
    before, row, after = rows_of(tmp_path, text, max_row_bytes=100)
    assert (before.sample_id, row.reason, after.sample_id) == ("a", "row_too_large", "c")
    assert len(rows_of(tmp_path, text)) == 3  # the csv module's own limit is 131,072 characters


def test_a_header_that_names_a_column_twice_is_refused_and_one_without_rows_is_empty(tmp_path):
    path = write(tmp_path / "a.tsv", b"text\ttext\na\tb\n")
    assert "names of columns must be unique, got 'text' twice" in refusal(path)
    assert "no rows: every file is empty" in refusal(write(tmp_path / "b.csv", b"id,text\n"))
    assert ids(write(tmp_path / "c.csv", b" id , text\n1,a\n")) == ["1"]


def test_a_table_without_known_columns_is_rejected_with_its_columns(tmp_path):
    [row] = rows_of(tmp_path, "question;label\na;1\n")
    assert row.reason == "unknown_layout"
    assert "got the keys ['question;label']" in row.detail
