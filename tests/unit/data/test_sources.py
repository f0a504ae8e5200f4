"""Which files a path, a folder, a glob or a URL means; what each is refused with."""

import glob
import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from selectmoe.data.readers import read_corpora, read_corpus
from selectmoe.data.sources import list_files, quote_url
from tests.corpus_files import MESSAGES, ids, jsonl, refusal, write


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
    require_found(tmp_path, pattern, found)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", "1234"),  # with the folders that it names
        ("s*", "34"),
        ("?", "34"),
        ("{1,2}.jsonl", "12"),
        ("{1,s/3}.jsonl", "13"),
        ("{1.jsonl,s}", "134"),
        ("{[12].jsonl,s/*/*}", "124"),
        ("**/t", "4"),
        ("**/{3,4}.jsonl", "34"),
        ("s/**/*.jsonl", "34"),
        ("**.jsonl", "1234"),
        ("[^1].jsonl", "2"),
    ],
)
def test_globs_may_name_folders_and_alternatives(tmp_path, pattern, found):
    require_found(tmp_path, pattern, found)


def require_found(folder, pattern, found):
    """The ids of rows that a pattern finds among files in nested folders."""
    for name, place in {"1": "1", "2": "2", "3": "s/3", "4": "s/t/4"}.items():
        write(folder / f"{place}.jsonl", jsonl(name))
    write(folder / "s" / "no.txt", b"no rows")
    assert "".join(sorted(ids(folder / pattern))) == found
    assert "".join(sorted(ids(f"file://{folder}/{pattern}"))) == found


@pytest.mark.parametrize("name", ["runs [v1]", "data[1]", "{a,b}", "a*", "what?", "[[]", "100%"])
def test_a_name_that_exists_is_itself_before_it_is_a_pattern(tmp_path, name):
    right = write(tmp_path / name / "x[1].jsonl", jsonl("right"))
    for look_alike in ("runs 1", "runs v", "data1", "a", "ab", "whats", "["):
        if look_alike != name:
            write(tmp_path / look_alike / "x1.jsonl", jsonl("wrong"))
    for spec in (tmp_path / name, right, f"{tmp_path}/{name}/*.jsonl", f"{tmp_path}/{name}/x*"):
        assert ids(spec) == ["right"]
        assert ids(f"file://{spec}") == ["right"]
    assert ids(f"{tmp_path}/{glob.escape(name)}/*.jsonl") == ["right"]


def test_a_class_may_hold_brackets(tmp_path):
    for name in ("a[b", "a]b", "a-b", "a^b"):
        write(tmp_path / f"{name}.jsonl", jsonl(name))
    assert ids(tmp_path / "a[[]b.jsonl") == ["a[b"]
    assert ids(tmp_path / "a[]]b.jsonl") == ["a]b"]
    assert sorted(ids(tmp_path / "a[!]^]b.jsonl")) == ["a-b", "a[b"]


def test_a_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for spec in (tmp_path / "a.jsonl", "/dev/null"):
        complaint = refusal(spec)
        assert complaint.startswith(
            f"{spec}: must be a file or a folder, is a named pipe, a device"
        )


def test_links_are_followed_once_and_a_dead_one_is_reported(tmp_path):
    write(tmp_path / "elsewhere" / "b.jsonl", jsonl("b"))
    write(tmp_path / "corpus" / "a.jsonl", jsonl("a"))
    (tmp_path / "corpus" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert ids(tmp_path / "corpus") == ["a", "b"]
    (tmp_path / "corpus" / "dead.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "dead.jsonl: cannot be read to its end" in refusal(tmp_path / "corpus")
    dead = tmp_path / "corpus" / "dead.jsonl"
    gone = tmp_path / "gone.jsonl"
    assert refusal(dead) == f"{dead}: is a link to {gone}, which does not exist"


def test_a_home_folder_and_a_relative_path_are_understood(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", jsonl("x"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ids("~/a.jsonl") == ids("a.jsonl") == ids(".") == ["x"]


def test_several_corpora_follow_each_other(tmp_path):
    first, second = (write(tmp_path / f"{n}.jsonl", jsonl(n)) for n in "ba")
    rows = read_corpora([str(first), str(second), str(first)])
    assert [row.sample_id for row in rows] == ["b", "a"]  # each file once


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
    text_file = write(tmp_path / "folder" / "a.txt", jsonl("x"))
    assert "file name must end in .jsonl, .ndjson, .jsonlines, .json, .csv" in refusal(text_file)
    assert "nothing readable: no .jsonl" in refusal(tmp_path / "folder")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    Path(os.fsdecode(name)).write_bytes(jsonl("x"))
    for spec in (tmp_path, os.fsdecode(name)):
        assert "the name of a file must be valid UTF-8" in refusal(spec)
    write(tmp_path / "named" / "a.jsonl", jsonl("x"))
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "named"), b"\xe9.md"))).touch()
    assert ids(tmp_path / "named") == ["x"]  # no corpus, so its name does not matter


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


@pytest.mark.parametrize("name", ["a b", "a[1]", "ä", "a?b", "a#b", "100%25", "100%"])
def test_a_file_url_may_hold_what_a_name_may(tmp_path, name):
    path = write(tmp_path / f"{name.replace('%25', '%')}.jsonl", jsonl("x"))
    for scheme in ("file://", "file://localhost", "file:", "FILE://"):
        assert ids(f"{scheme}{path.parent}/{name}.jsonl") == ["x"]


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
