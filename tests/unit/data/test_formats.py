"""The rows of .jsonl, .jsonl.gz and .parquet files, and broken ones."""

import base64
import datetime
import decimal
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe.config.columns import ColumnRules
from selectmoe.data.readers import read_corpus
from selectmoe.records import RejectedRow, Sample
from tests.corpus_files import MESSAGES, ids, jsonl, refusal, write, write_table


def test_lines_may_end_as_on_windows_or_not_at_all_and_begin_with_a_mark(tmp_path):
    assert ids(write(tmp_path / "a.jsonl", jsonl("1", "2")[:-1])) == ["1", "2"]
    lines = jsonl("1", "2").replace(b"\n", b"\r\n")
    assert ids(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines)) == ["1", "2"]


def test_blank_lines_are_no_rows_but_are_counted_as_an_editor_does(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b"\n" + jsonl("1") + b" \t\r\n" + b"{\n" + jsonl("2") + b"\n"
    )
    rows = list(read_corpus(str(path)))
    assert [getattr(row, "source", None) for row in rows] == [f"{path}:2", None, f"{path}:5"]
    assert (rows[1].row, rows[1].reason) == (4, "invalid_json")


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"text": "a"', "invalid_json", "line 2 is not valid JSON: Expecting ',' delimiter"),
        (b'{"text": "a"} {}', "invalid_json", "line 2 is not valid JSON: Extra data, at column 15"),
        (b"{'text': 'a'}", "invalid_json", "Expecting property name enclosed in double quotes"),
        (b'{"text": "\t"}', "invalid_json", "line 2 is not valid JSON: Invalid control character"),
        (b"\0\0\0\0", "invalid_json", "line 2 is not valid JSON: Expecting value, at column 1"),
        (b'{"text": "caf\xe9"}', "invalid_utf8", "line 2 is not valid UTF-8: 'utf-8' codec"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8", "line 2 is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "lone_surrogate", "got the lone surrogate '\\ud800'"),
        (b'{"id": ' + b"9" * 5_000 + b"}", "invalid_json", "line 2 is not readable JSON: Exceeds"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json", "line 2 is not readable JSON: max"),
        (b"[1, 2]", "not_an_object", "a row must be a JSON object, got list [1, 2]"),
        (b'{"text": NaN}', "messages_wrong_type", "'text' must be text, got float nan"),
    ],
)
def test_a_bad_line_is_rejected_and_its_neighbours_are_read(tmp_path, line, reason, detail):
    path = write(tmp_path / "a.jsonl", jsonl("1") + line + b"\n" + jsonl("3"))
    before, row, after = read_corpus(str(path))
    assert (before.sample_id, after.sample_id) == ("1", "3")
    assert (row.file, row.row, row.dataset, row.reason) == (str(path), 2, "a", reason)
    assert detail in row.detail


def test_of_equal_keys_the_last_counts_and_numbers_beyond_json_in_other_keys_do_not(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "text": "b", "loss": NaN, "n": -Infinity}')
    [row] = read_corpus(str(path))
    assert row.messages[0].content == "b"


def test_a_row_over_the_limit_is_rejected_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(jsonl("1") + b'{"text": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + jsonl("3"))
    tracemalloc.start()
    before, row, after = read_corpus(str(path), max_row_bytes=1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (before.sample_id, row.reason, after.sample_id) == ("1", "row_too_large", "3")
    assert row.detail == "a row must have at most 1,048,576 bytes, got 67,108,876"
    # The limit, a chunk, and their sum for a moment: far from the row's 64 MiB.
    assert peak < 8 << 20


@pytest.mark.parametrize("size", [99, 100, 101])
def test_the_limit_is_the_largest_row_that_is_read(tmp_path, size):
    row = {"id": "1", "text": ""}
    row["text"] = "x" * (size - len(json.dumps(row)))
    path = write(tmp_path / "a.jsonl", json.dumps(row).encode() + b"\n" + jsonl("2"))
    kinds = [type(row) for row in read_corpus(str(path), max_row_bytes=100)]
    assert kinds == [Sample if size <= 100 else RejectedRow, Sample]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_lines_are_the_same_wherever_the_chunks_end(tmp_path, monkeypatch, ending):
    names = ["", "é" * 30, "日本語", "x" * 100]
    lines = b"".join(
        json.dumps({"text": f"a{name}"}, ensure_ascii=False).encode() + b"\n" for name in names
    )
    path = write(tmp_path / f"a{ending}", gzip.compress(lines) if ending != ".jsonl" else lines)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("selectmoe.data.byte_streams.CHUNK_BYTES", size)
        rows = list(read_corpus(str(path)))
        assert [row.messages[0].content[1:] for row in rows] == names


def test_a_file_of_another_kind_than_its_name_says_is_refused(tmp_path):
    packed = gzip.compress(jsonl("1"))
    assert "is gzip-compressed: its name" in refusal(write(tmp_path / "a.jsonl", packed))
    assert "Not a gzipped file" in refusal(write(tmp_path / "b.jsonl.gz", jsonl("1")))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        content = ("\ufeff" if encoding != "utf-16" else "") + jsonl("1").decode()
        path = write(tmp_path / "c.jsonl", content.encode(encoding))
        assert refusal(path).endswith("c.jsonl: must be UTF-8, is UTF-16")
    parquet = write_table(tmp_path / "d.parquet", text=["a"]).rename(tmp_path / "d.jsonl")
    assert "is a parquet file: its name must end in .parquet" in refusal(parquet)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(jsonl(*(str(n * n) for n in range(20_000))))
    damaged = {
        "ended before the end-of-stream": whole[:-20],
        # After the ten bytes of the header; a block of type 3 does not exist.
        "while decompressing data: invalid block type": whole[:10] + b"\xff" + whole[11:],
        "CRC check failed": whole[:-8] + b"\0" * 4 + whole[-4:],
    }
    for reason, content in damaged.items():
        complaint = refusal(write(tmp_path / "a.jsonl.gz", content))
        assert complaint.startswith(f"{tmp_path}/a.jsonl.gz: cannot be read to its end: ")
        assert reason in complaint


@pytest.mark.parametrize(
    "text",
    [
        pa.array(["Because."], pa.large_string()),
        pa.array(["Because."], pa.string_view()),
        pa.array(["Because."]).dictionary_encode(),
    ],
    ids=["large_string", "string_view", "dictionary"],
)
def test_every_kind_of_text_column_is_read(tmp_path, text):
    turn = pa.StructArray.from_arrays(
        [pa.array(["assistant"]).cast(text.type), text], names=["role", "content"]
    )
    for number, kind in enumerate((pa.ListArray, pa.LargeListArray)):
        path = write_table(tmp_path / f"{number}.parquet", messages=kind.from_arrays([0, 1], turn))
        [row] = read_corpus(str(path))
        assert row.messages[0].content == "Because."


def test_columns_that_are_no_part_of_a_sample_may_hold_anything(tmp_path):
    path = write_table(
        tmp_path / "a.parquet",
        text=["a"],
        at=pa.array([1], pa.timestamp("ns")),  # Python has no nanoseconds
        picture=pa.array([b"\xff" * 100]),
        broken=text_of_bytes(b"\xff"),
    )
    [row] = read_corpus(str(path))
    columns = json.loads(row.extra_columns)
    assert columns["at"].startswith("1970-01-01")
    assert columns | {"at": None} == {
        "at": None,
        "picture": base64.b64encode(b"\xff" * 100).decode(),
        "broken": base64.b64encode(b"\xff").decode(),
    }
    [row] = read_corpus(str(path), rules=ColumnRules(keeps_extra=False))
    assert row.extra_columns == ""


def test_types_of_arrow_have_a_form_in_json(tmp_path):
    day = datetime.datetime(2026, 1, 31, 12, 30, tzinfo=datetime.UTC)
    path = write_table(
        tmp_path / "a.parquet",
        text=["a"],
        category=pa.array(["qa"]).dictionary_encode(),
        at=pa.array([day], pa.timestamp("ms", "UTC")),
        price=pa.array([decimal.Decimal("1.50")]),
        nested=pa.array([{"tags": ["x", None], "n": 3}]),
        nothing=pa.nulls(1),
        missing=pa.array([float("nan")]),
    )
    [row] = read_corpus(str(path))
    assert json.loads(row.extra_columns) == {
        "category": "qa",
        "at": "2026-01-31T12:30:00+00:00",
        "price": "1.50",
        "nested": {"tags": ["x", None], "n": 3},
        "nothing": None,
        "missing": None,
    }


def test_messages_whose_turns_share_all_keys_are_plain_where_these_are_null(tmp_path):
    keys = ("role", "content", "name", "tool_calls")
    turns = [dict.fromkeys(keys) | turn for turn in MESSAGES]
    kind = pa.list_(pa.struct([(key, pa.string()) for key in keys]))
    path = write_table(tmp_path / "a.parquet", messages=pa.array([turns], kind))
    [row] = read_corpus(str(path))
    assert [message.fields for message in row.messages] == ["", ""]


def test_a_row_with_a_large_column_is_refused_with_what_to_do(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=["a", "b"], picture=[b"x" * 999, b"y"])
    large, small = read_corpus(str(path), max_row_bytes=500)
    assert large.reason == "row_too_large"
    assert large.detail.endswith("dataset.extra_columns=drop leaves out columns that nothing reads")
    assert isinstance(small, Sample)


def test_a_table_with_columns_of_other_names_is_read_by_these(tmp_path):
    path = write_table(tmp_path / "a.parquet", q=["Why?"], a=["Because."], text=["No."])
    for keeps_extra in (True, False):
        rules = ColumnRules({"prompt": "q", "response": "a"}, keeps_extra=keeps_extra)
        [row] = read_corpus(str(path), rules=rules)
        assert [message.content for message in row.messages] == ["Why?", "Because."]
        assert row.extra_columns == ('{"text": "No."}' if keeps_extra else "")


def text_of_bytes(*contents: bytes) -> pa.Array:
    """A column that claims to be text, as careless writers make it."""
    return pa.array(contents, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_costs_its_row_only(tmp_path):
    texts = text_of_bytes(b"a", b"caf\xe9", "é".encode())
    before, row, after = read_corpus(str(write_table(tmp_path / "a.parquet", text=texts)))
    assert (before.messages[0].content, after.messages[0].content) == ("a", "é")
    assert (row.row, row.reason) == (2, "unreadable_row")
    complaint = "column 'text': UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9"
    assert row.detail.startswith(f"row 2 cannot be decoded: {complaint}")


def test_a_time_that_python_has_not_costs_nothing_or_its_row_with_the_column_named(tmp_path):
    late = pa.array([10**11, 0], pa.timestamp("s"))  # the year 5138
    later = pa.array([10**12, 0], pa.timestamp("s"))  # the year 33658
    path = write_table(tmp_path / "a.parquet", text=["a", "b"], late=late, later=later)
    first, _ = read_corpus(str(path))
    assert json.loads(first.extra_columns)["late"] == "5138-11-16T09:46:40"
    assert json.loads(first.extra_columns)["later"] == 10**15  # milliseconds
    zoned = pa.array([0], pa.timestamp("s", tz="Nowhere/At_all"))
    [row] = read_corpus(str(write_table(tmp_path / "b.parquet", text=["a"], time=zoned)))
    assert row.reason == "unreadable_row"
    assert row.detail.startswith("row 1 cannot be decoded: column 'time': ")


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert refusal(path) == f"{path}: names of columns must be unique, got 'text' twice"


def test_every_row_of_an_unknown_table_is_rejected_with_its_columns(tmp_path):
    path = write_table(tmp_path / "a.parquet", question=["a"] * 300, label=range(300))
    rows = list(read_corpus(str(path)))
    assert [row.row for row in rows] == list(range(1, 301))
    assert "got the keys ['question', 'label']" in rows[299].detail


def test_a_table_may_mix_layouts(tmp_path):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    messages = pa.array([None, MESSAGES, None], kind)
    path = write_table(
        tmp_path / "a.parquet", messages=messages, text=["a", None, None], id=[1, 2, 3]
    )
    first, second, third = read_corpus(str(path))
    assert (first.messages[0].content, len(second.messages)) == ("a", 2)
    assert (third.sample_id, third.reason) == ("3", "messages_wrong_type")


def test_a_row_of_parquet_over_the_limit_is_rejected(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=["é" * 50, "é" * 51], id=["1", "2"])
    row, too_large = read_corpus(str(path), max_row_bytes=100)
    assert (row.sample_id, too_large.sample_id) == ("1", "2")
    assert too_large.detail == "a row must have at most 100 bytes, got 102"


def test_a_damaged_parquet_file_is_refused(tmp_path):
    whole = write_table(tmp_path / "a.parquet", text=[f"text {n}" for n in range(999)]).read_bytes()
    for content in (
        b"",
        b"PAR1" * 100,
        whole[: len(whole) // 2],
        whole[:4] + b"\0" * 200 + whole[204:],
    ):
        complaint = refusal(write(tmp_path / "b.parquet", content))
        assert complaint.startswith(f"{tmp_path}/b.parquet: not a readable parquet file: ")
    assert "no rows" in refusal(write_table(tmp_path / "c.parquet", text=pa.array([], pa.string())))


def test_reasoning_counts_towards_the_limit_of_a_row(tmp_path):
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "x" * 200}
    rows = [{"id": "1", "messages": [{"role": "user", "content": "Is it?"}, answer]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    [too_large] = read_corpus(str(tmp_path / "a.parquet"), max_row_bytes=100)
    assert too_large.reason == "row_too_large"
