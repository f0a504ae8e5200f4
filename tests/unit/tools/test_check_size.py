"""The size budget counts what it says it counts."""

from pathlib import Path

import pytest

from tools.check_size import main, measure, percentile_90


def function_of(num_lines: int) -> str:
    return "def long() -> None:\n" + "    pass\n" * (num_lines - 1)


def test_comments_behind_code_count_and_docstrings_do_not(tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    file.write_text('"""Not # a comment."""\n# one\nX = 1  # two\nY = "# no"\n')
    assert measure(file).num_comment_lines == 2


def test_nine_in_ten_functions_are_at_most_as_long_as_the_percentile() -> None:
    assert percentile_90([*range(1, 10), 99]) == 9
    assert percentile_90([]) == 0


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("X = 1\n" * 401, "401 lines, at most 400"),
        (function_of(61), "long has 61 lines, at most 60"),
        (function_of(26), "function p90 is 26 lines, at most 25"),
    ],
    ids=["file", "function", "p90"],
)
def test_a_breach_is_named_and_fails(
    source: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.py").write_text(source)
    assert main([str(tmp_path)]) == 1
    assert sentence in capsys.readouterr().err


def test_a_folder_at_the_limits_passes(tmp_path: Path) -> None:
    (tmp_path / "fits.py").write_text(function_of(25) + "X = 1\n" * 375)
    assert main([str(tmp_path)]) == 0


def test_short_functions_of_tests_hide_no_long_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, source in {"selectmoe": function_of(26), "tests": function_of(2) * 99}.items():
        Path(folder).mkdir()
        Path(folder, "file.py").write_text(source)
    assert main(["selectmoe", "tests"]) == 1
    printed = capsys.readouterr()
    assert "product lines (selectmoe, jobs, serve): 26\n" in printed.out
    assert "function p90 is 26 lines" in printed.err
