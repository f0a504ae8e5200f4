"""Parts of corpora: together the rows of the whole, with the same numbers, each about as large."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectmoe.corpus.parts import CorpusPart, read_part, split_corpora
from selectmoe.data.formats import FileSlice
from selectmoe.data.listing import list_corpora
from selectmoe.data.readers import read_corpora
from selectmoe.errors import DataError


def split(*specs: Path, min_part_bytes: int, **settings: int) -> list[CorpusPart]:
    listing = list_corpora(list(map(str, specs)))
    return split_corpora(listing, min_part_bytes=min_part_bytes, **settings)


def rows_of(parts: list[CorpusPart]) -> list[object]:
    return [row for part in parts for _, row in read_part(part)]


def line(n: int) -> str:
    return json.dumps({"text": f"row {n} {'x' * (7 * n % 40)}"}) + "\n"


@settings(deadline=None)  # a busy machine opens a thousand slices slowly
@given(
    st.lists(st.sampled_from([line(1), line(5), line(11), "\n", "no JSON\n", "\r\n"]), max_size=30),
    st.integers(1, 200),
    st.booleans(),
)
def test_lines_cut_anywhere_are_those_of_the_file(tmp_path_factory, lines, size, ends_with_feed):
    text = line(0) + "".join(lines)
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes((text if ends_with_feed else text[:-1]).encode())
    parts = split(path, min_part_bytes=size)
    assert rows_of(parts) == list(read_corpora([str(path)]))
    if size < len(text) - 1:
        assert len(parts) > 1


def test_the_first_row_of_a_slice_has_its_number_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(map(line, range(50))).encode())
    parts = split(path, min_part_bytes=path.stat().st_size // 3)
    slices = [piece.slice for part in parts for piece in part]
    assert [piece.start for piece in slices] == [0, *(piece.stop for piece in slices[:-1])]
    for part, piece in zip(parts, slices, strict=True):
        spec, first = next(read_part(part))
        assert spec == str(path)
        assert first.source == f"{path}:{piece.first_row}"
        assert first.messages[-1].content.startswith(f"row {piece.first_row - 1} ")


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_row_groups_of_a_large_parquet_file_come_apart(tmp_path, row_group_size):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {n} {'x' * 100}" for n in range(100)], "other": range(100)})
    pq.write_table(table, path, row_group_size=row_group_size, compression="none")
    parts = split(path, min_part_bytes=3_000)
    assert rows_of(parts) == list(read_corpora([str(path)]))
    assert (len(parts) > 3) == (row_group_size < 100)


def test_small_files_come_together_whatever_corpora_they_are_of(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for n in range(20):
            (tmp_path / folder / f"{n}.jsonl").write_text(line(n))
    parts = split(tmp_path / "a", tmp_path / "b", min_part_bytes=200)
    assert rows_of(parts) == list(read_corpora([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert 4 < len(parts) < 20
    sizes = [sum(Path(piece.slice.path).stat().st_size for piece in part) for part in parts]
    assert max(sizes) <= 200
    for part in parts:
        assert [spec for spec, _ in read_part(part)] == [piece.spec for piece in part]
    assert any(len({piece.spec for piece in part}) == 2 for part in parts)


def test_there_are_no_more_parts_than_wanted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(map(line, range(300))))
    assert len(split(path, min_part_bytes=10, max_parts=8)) == 8


def test_a_compressed_file_is_one_part_however_large(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(map(line, range(300))).encode()))
    [[piece]] = split(path, min_part_bytes=10)
    assert piece.slice == FileSlice(str(path), name="a.jsonl.gz", dataset="a")


def test_what_is_not_a_parquet_file_is_refused_by_its_reader(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    [part] = split(path, min_part_bytes=1)
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_part(part))


def test_a_corpus_without_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        split(tmp_path / "missing.jsonl", min_part_bytes=1)
