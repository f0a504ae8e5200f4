"""Files, folders, globs, URLs and hub data sets as streams of samples; what each refuses."""

import gzip
import json
import os
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from selectmoe.data.readers import read_corpora, read_corpus
from selectmoe.data.sources import list_files, quote_url
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def jsonl(*names: str) -> bytes:
    """A row with each name as its id."""
    return "".join(json.dumps({"id": name, "text": "Because."}) + "\n" for name in names).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def ids(spec: object) -> list[str]:
    rows = list(read_corpus(str(spec)))
    assert all(isinstance(row, Sample) for row in rows), rows
    return [row.sample_id for row in rows]


def refusal(spec: object) -> str:
    """What the corpus is refused with: one line that begins with what was asked for."""
    with pytest.raises(DataError) as caught:
        list(read_corpus(str(spec)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which files


@pytest.mark.parametrize(
    "name", ["a.jsonl", "ä ö/日本 😀.jsonl", "a[1].jsonl", "a?.jsonl", "%41.jsonl"]
)
def test_a_file_is_read_whatever_its_name(tmp_path, name):
    assert ids(write(tmp_path / name, jsonl("x"))) == ["x"]


def test_gzip_and_parquet_give_what_jsonl_gives(tmp_path):
    rows = [{"id": "1", "messages": MESSAGES}, {"id": "2", "messages": MESSAGES}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write(tmp_path / "a" / "c.jsonl", lines)
    write(tmp_path / "b" / "c.jsonl.gz", gzip.compress(lines[:50]) + gzip.compress(lines[50:]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    corpora = [list(read_corpus(str(tmp_path / name))) for name in ("a", "b", "c.parquet")]
    what = [[(row.dataset, row.sample_id, row.messages) for row in rows] for rows in corpora]
    assert what[0] == what[1] == what[2]
    assert [row.source for row in corpora[2]] == [f"{tmp_path}/c.parquet:{n}" for n in (1, 2)]


def test_a_folder_is_read_in_natural_order_with_its_subfolders(tmp_path):
    names = ["part-10.jsonl", "part-2.jsonl", "part-02.jsonl", "x1²3.jsonl", "s/part-1.jsonl"]
    for name in names:
        write(tmp_path / name, jsonl(name))
    in_order = ["part-02.jsonl", "part-2.jsonl", "part-10.jsonl", "s/part-1.jsonl", "x1²3.jsonl"]
    assert ids(tmp_path) == in_order


def test_a_folder_is_read_without_its_other_and_its_hidden_files(tmp_path):
    for name in ("a.jsonl", ".hidden.jsonl", "_tmp.jsonl", "_temporary/b.jsonl", ".git/c.jsonl"):
        write(tmp_path / ".corpus" / name, jsonl(name))
    write(tmp_path / ".corpus" / "README.md", b"# Corpus")
    write(tmp_path / ".corpus" / "a.json", jsonl("no"))
    assert ids(tmp_path / ".corpus") == ["a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", "12"),
        ("?.jsonl", "12"),
        ("[13].jsonl", "1"),
        ("[!1].jsonl", "2"),
        ("s/*.jsonl", "3"),
        ("*/*.jsonl", "3"),
        ("**/*.jsonl", "1234"),
        ("s/**", "34"),
    ],
)
def test_globs_match_as_in_a_shell(tmp_path, pattern, found):
    for name, place in {"1": "1", "2": "2", "3": "s/3", "4": "s/t/4"}.items():
        write(tmp_path / f"{place}.jsonl", jsonl(name))
    write(tmp_path / "s" / "no.txt", b"no rows")
    assert "".join(sorted(ids(tmp_path / pattern))) == found
    assert "".join(sorted(ids(f"file://{tmp_path}/{pattern}"))) == found


def test_links_are_followed_once_and_a_dead_one_is_reported(tmp_path):
    write(tmp_path / "elsewhere" / "b.jsonl", jsonl("b"))
    write(tmp_path / "corpus" / "a.jsonl", jsonl("a"))
    (tmp_path / "corpus" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert ids(tmp_path / "corpus") == ["a", "b"]
    (tmp_path / "corpus" / "dead.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "dead.jsonl: cannot be read to its end" in refusal(tmp_path / "corpus")


def test_a_home_folder_and_a_relative_path_are_understood(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", jsonl("x"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ids("~/a.jsonl") == ids("a.jsonl") == ids(".") == ["x"]


def test_several_corpora_follow_each_other(tmp_path):
    first, second = (write(tmp_path / f"{n}.jsonl", jsonl(n)) for n in "ba")
    rows = read_corpora([str(first), str(second), str(first)])
    assert [row.sample_id for row in rows] == ["b", "a", "b"]


def test_what_is_not_there_is_refused_with_what_is_near(tmp_path):
    write(tmp_path / "train.jsonl", jsonl("x"))
    path = tmp_path / "trian.jsonl"
    assert refusal(path) == f"{path}: no such file or folder; did you mean 'train.jsonl'?"
    assert refusal(tmp_path / "no" / "train.jsonl").endswith("no such file or folder")
    for pattern in ("*.parquet", "no/*.jsonl", "[ab].jsonl"):
        assert refusal(tmp_path / pattern).endswith("no file matches the pattern")
    assert refusal("").startswith("a corpus must be a file, a folder, a glob, a URL or hub:NAME")


def test_what_is_not_readable_is_refused(tmp_path):
    assert "no rows: every file is empty" in refusal(write(tmp_path / "a.jsonl", b""))
    assert "no rows: every file is empty" in refusal(write(tmp_path / "a.jsonl", b"\n \r\n\n"))
    json_file = write(tmp_path / "folder" / "a.json", jsonl("x"))
    assert "file name must end in .jsonl, .jsonl.gz, .parquet" in refusal(json_file)
    assert "nothing readable: no .jsonl" in refusal(tmp_path / "folder")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    Path(os.fsdecode(name)).write_bytes(jsonl("x"))
    for spec in (tmp_path, os.fsdecode(name)):
        assert "the name of a file must be valid UTF-8" in refusal(spec)
    write(tmp_path / "named" / "a.jsonl", jsonl("x"))
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "named"), b"\xe9.md"))).touch()
    assert ids(tmp_path / "named") == ["x"]  # no corpus, so its name does not matter


# Lines


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
        monkeypatch.setattr("selectmoe.data.formats._CHUNK_BYTES", size)
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


# Parquet


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
    assert ids(path) == ["a.parquet:1"]


def text_of_bytes(*contents: bytes) -> pa.Array:
    """A column that claims to be text, as careless writers make it."""
    return pa.array(contents, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_costs_its_row_only(tmp_path):
    texts = text_of_bytes(b"a", b"caf\xe9", "é".encode())
    before, row, after = read_corpus(str(write_table(tmp_path / "a.parquet", text=texts)))
    assert (before.messages[0].content, after.messages[0].content) == ("a", "é")
    assert (row.row, row.reason) == (2, "unreadable_row")
    assert row.detail.startswith("row 2 cannot be decoded: 'utf-8' codec can't decode byte 0xe9")


def test_every_row_of_an_unknown_table_is_rejected_with_its_columns(tmp_path):
    path = write_table(tmp_path / "a.parquet", question=["a"] * 300, label=range(300))
    rows = list(read_corpus(str(path)))
    assert [row.row for row in rows] == list(range(1, 301))
    assert rows[299].detail.endswith("got the keys ['question', 'label']")


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


# Object stores


@pytest.fixture
def bucket():
    """A bucket of fsspec's object store in memory."""
    store = fsspec.filesystem("memory")
    files = {
        "x/2.jsonl": jsonl("2"),
        "x/10.jsonl.gz": gzip.compress(jsonl("10")),
        "y/_z.jsonl": b"",
    }
    for name, content in files.items():
        store.pipe(f"/bucket/{name}", content)
    with store.open("/bucket/x/y/3.parquet", "wb") as file:
        pq.write_table(pa.table({"id": ["3"], "text": ["a"]}), file)
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


def test_an_object_store_is_read_as_a_folder_is(bucket):
    assert ids(bucket) == ["2", "10", "3"]
    assert ids(f"{bucket}/x/") == ["2", "10", "3"]
    assert ids(f"{bucket}/x/10.jsonl.gz") == ["10"]
    assert ids(f"{bucket}/x/*.jsonl*") == ["2", "10"]
    assert ids(f"{bucket}/**/?.parquet") == ["3"]


def test_an_object_store_refuses_as_a_folder_does(bucket):
    assert refusal(f"{bucket}/z") == f"{bucket}/z: no such file or folder"
    assert "nothing readable" in refusal(f"{bucket}/y")
    assert "no file matches the pattern" in refusal(f"{bucket}/*.jsonl")
    assert refusal("gopher://x").endswith("cannot be reached: Protocol not known: gopher")


def test_paths_that_begin_with_a_bucket_are_listed_and_matched(tmp_path):
    # As S3 and GCS of Arrow give them: "bucket/key", with no slash before.
    for name in ("x/2.jsonl", "x/10.jsonl", "y/1.jsonl"):
        write(tmp_path / "bucket" / name, jsonl("x"))
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert list_files(store, "bucket/x", "") == ["bucket/x/2.jsonl", "bucket/x/10.jsonl"]
    assert list_files(store, "bucket/*/1*.jsonl", "") == ["bucket/x/10.jsonl", "bucket/y/1.jsonl"]


@pytest.mark.parametrize("name", ["a b", "a[1]", "ä", "a?b", "a#b", "100%25"])
def test_a_file_url_may_hold_what_a_name_may(tmp_path, name):
    path = write(tmp_path / f"{name.replace('%25', '%')}.jsonl", jsonl("x"))
    assert ids(f"file://{path.parent}/{name}.jsonl") == ["x"]


def test_settings_of_a_url_are_kept_and_google_gives_up_in_time():
    url = "s3://b/part-?[ab].jsonl?region=eu-west-1&endpoint_override=localhost%3A9000"
    assert quote_url(url) == url.replace("?[ab]", "%3F%5Bab%5D")
    assert quote_url("gs://b/a.jsonl") == "gs://b/a.jsonl?retry_limit_seconds=15"
    assert quote_url("gs://b/a?retry_limit_seconds=900") == "gs://b/a?retry_limit_seconds=900"


class _Forbidding(BaseHTTPRequestHandler):
    """An S3 that knows nobody."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


@pytest.fixture
def forbidding_store(monkeypatch):
    """The settings of a URL that lead to a local S3 which refuses; no credentials are to be had."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else asked for over the network
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"scheme=http&region=us-east-1&endpoint_override=127.0.0.1%3A{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["a.jsonl", "corpus/*.jsonl"])
def test_a_store_without_credentials_is_refused_in_one_line(forbidding_store, path):
    url = f"s3://bucket/{path}?{forbidding_store}"
    complaint = refusal(url)
    assert complaint.startswith(f"{url}: cannot be listed: ")
    assert "ACCESS_DENIED" in complaint


# The hub


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as it lies on the hub, with two splits."""
    folder = tmp_path / "org" / "name"
    rows = [{"id": "1", "messages": MESSAGES}, {"id": "2", "messages": MESSAGES[:1]}]
    for split, order in {"train": 1, "test": -1}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[::order])
        write(folder / f"{split}.jsonl", lines.encode())
    return folder


def test_a_hub_data_set_is_read_by_split(hub_folder):
    sample, row = read_corpus(f"hub:{hub_folder}")
    assert (sample.dataset, sample.sample_id, len(sample.messages)) == ("name", "1", 2)
    assert (row.file, row.row, row.reason) == (f"hub:{hub_folder}", 2, "no_assistant_turn")
    other_split = read_corpus(f"hub:{hub_folder}:test", max_row_bytes=5)
    assert [row.reason for row in other_split] == ["no_assistant_turn", "row_too_large"]
    complaint = refusal(f"hub:{hub_folder}:valid")
    assert (
        "could not be downloaded from the hub: Bad split: valid. Available splits: ['t" in complaint
    )


def test_the_hub_is_refused_within_seconds_without_a_network():
    started = time.monotonic()
    assert refusal("hub:no/such").startswith("hub:no/such: could not be downloaded from the hub: ")
    # Offline mode asks nobody; importing `datasets` takes most of the time.
    assert time.monotonic() - started < 20
    assert refusal("hub:") == "hub:: must be hub:NAME or hub:NAME:SPLIT"


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the package `datasets`: pip install 'selectmoe[hub]'" in refusal("hub:a/b")


def test_a_reader_that_is_left_early_closes_its_file(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(*map(str, range(10_000)))))
    rows = read_corpus(str(path))
    assert next(rows).sample_id == "0"
    rows.close()
    open_files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert str(path) not in open_files
