"""Files of every format and compression: by the ending of their names, in any case."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from selectmoe.data.endings import FORMATS, find_ending
from selectmoe.data.readers import read_corpus
from tests.corpus_files import MESSAGES, ids, jsonl, refusal, write

ROWS = [{"id": n, "prompt": f"What is {n}?", "response": f"{n}, ü.\nSo."} for n in "abc"]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TEXTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".ndjson": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ".jsonlines": "".join(json.dumps(row) + "\r\n" for row in ROWS),
    ".json": json.dumps(ROWS, indent=1),
    ".csv": "id,prompt,response\r\n"
    + "".join(f'{r["id"]},{r["prompt"]},"{r["response"]}"\r\n' for r in ROWS),
    ".tsv": "id\tprompt\tresponse\n"
    + "".join(f'{r["id"]}\t{r["prompt"]}\t"{r["response"]}"\n' for r in ROWS),
}


def contents(path):
    return [(row.sample_id, *(m.content for m in row.messages)) for row in read_corpus(str(path))]


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("ending", TEXTS)
def test_every_format_of_text_gives_the_same_rows_in_every_compression(
    tmp_path, ending, compression
):
    text = TEXTS[ending].encode()
    content = COMPRESS[compression](text) if compression else text
    for name in (f"a{ending}{compression}", f"A{ending.upper()}{compression.title()}"):
        assert contents(write(tmp_path / name, content)) == [tuple(r.values()) for r in ROWS], name


@pytest.mark.parametrize("ending", [".parquet", ".pq", ".arrow", ".feather", ".Arrow"])
def test_every_format_of_tables_gives_the_same_rows(tmp_path, ending):
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / f"a{ending}"
    if find_ending(path.name).format == "parquet":
        pq.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, str(path), chunksize=2)
    assert contents(path) == [tuple(row.values()) for row in ROWS]
    with (  # as in the cache of `datasets`
        pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    assert contents(tmp_path / "stream.arrow") == [tuple(row.values()) for row in ROWS]


def test_a_long_batch_of_an_arrow_file_is_read_whole(tmp_path):
    table = pa.table({"text": [f"row {n}" for n in range(1_000)], "extra": range(1_000)})
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"), compression="zstd")
    rows = list(read_corpus(str(tmp_path / "a.feather")))
    assert [row.messages[0].content for row in rows] == [f"row {n}" for n in range(1_000)]
    assert rows[999].sample_id == "a.feather:1000"


def test_only_the_listed_endings_are_readable():
    for name in (
        "a.parquet.gz",
        "a.jsonl.part",
        "a.gz",
        "a.jsonl.crc",
        "jsonl",
        "a.txt",
        "a/b.c/d",
    ):
        assert find_ending(name) is None
    for ending in FORMATS:
        assert find_ending(f"x.y{ending}").text == ending


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_that_is_cut_or_is_not_what_its_name_says_is_refused(tmp_path, compression):
    name = f"a.jsonl{compression}"
    whole = COMPRESS[compression](jsonl(*map(str, range(5_000))))
    for content in (whole[: len(whole) // 2], b"no such compression" * 9, whole[:5]):
        assert "cannot be read to its end: " in refusal(write(tmp_path / name, content))
    complaint = refusal(write(tmp_path / "a.jsonl", whole))
    assert complaint.endswith(f"-compressed: its name must end in {name[1:]}")


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_after_a_compressed_stream_is_never_left_out(tmp_path, compression):
    """As in `cat a.jsonl.xz b.jsonl > all.jsonl.xz`."""
    content = COMPRESS[compression](jsonl("1")) + jsonl("2")
    assert "cannot be read" in refusal(write(tmp_path / f"a.jsonl{compression}", content))


def test_zeros_that_pad_a_stream_are_no_text(tmp_path):
    parts = (lzma.compress(jsonl("1")), bytes(2_000_000), lzma.compress(jsonl("2")), bytes(4))
    assert ids(write(tmp_path / "a.jsonl.xz", b"".join(parts))) == ["1", "2"]


@pytest.mark.parametrize("ending", [*FORMATS, ".jsonl.gz", ".csv.zst", ".json.xz"])
def test_a_pointer_of_git_lfs_is_refused_with_what_downloads_the_file(tmp_path, ending):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    path = write(tmp_path / f"a{ending}", pointer)
    complaint = "is a pointer of Git LFS instead of the file; git lfs pull downloads it"
    assert refusal(path) == f"{path}: {complaint}"


def test_parts_of_a_compressed_file_that_were_joined_are_all_read(tmp_path):
    for compression, compress in COMPRESS.items():
        content = b"".join(compress(jsonl(name)) for name in "xyz")
        assert ids(write(tmp_path / f"a.jsonl{compression}", content)) == ["x", "y", "z"]


def test_a_byte_order_mark_before_any_line_is_no_part_of_it(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert ids(write(tmp_path / "a.jsonl", mark + jsonl("1") + mark + mark + jsonl("2"))) == [*"12"]
    assert ids(write(tmp_path / "a.jsonl", mark + b"\r\n" + jsonl("1") + mark)) == ["1"]
    assert "no rows" in refusal(write(tmp_path / "a.jsonl", mark))
    assert ids(write(tmp_path / "a.json", mark + b'[{"id": 1, "text": "a"}]')) == ["1"]
    assert ids(write(tmp_path / "a.csv", mark + b"id,text\r\n1,a\r\n")) == ["1"]
    assert contents(write(tmp_path / "a.jsonl", b'{"id": 1, "text": "\xef\xbb\xbfa"}')) == [
        ("1", "\ufeffa")
    ]


def test_messages_are_read_from_every_format(tmp_path):
    row = {"id": "m", "messages": MESSAGES}
    write(tmp_path / "a.json", json.dumps([row]).encode())
    quoted = json.dumps(MESSAGES).replace('"', '""')
    write(tmp_path / "b.csv", f'id,messages\nm,"{quoted}"\n'.encode())
    pyarrow.feather.write_feather(pa.Table.from_pylist([row]), str(tmp_path / "c.feather"))
    rows = list(read_corpus(str(tmp_path)))
    assert [row.sample_id for row in rows] == ["m"] * 3
    assert rows[0].messages == rows[1].messages == rows[2].messages
