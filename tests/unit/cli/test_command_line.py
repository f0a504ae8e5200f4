import errno
import signal

import pytest

from selectmoe.cli.command_line import (
    CommandParser,
    format_table,
    is_user_mistake,
    one_line,
    parse_arguments,
    printable,
    run_command,
)
from selectmoe.cli.main import main
from selectmoe.errors import DataError


def test_a_bug_is_no_mistake():
    assert is_user_mistake(DataError("corpus.jsonl: no such file"))
    assert not is_user_mistake(RuntimeError("x"))
    # A closed pipe or a lost connection names no file: nothing that a user could mend.
    assert not is_user_mistake(ConnectionResetError(errno.ECONNRESET, "reset"))


def test_a_full_disk_is_one_line_with_the_file():
    error = OSError(errno.ENOSPC, "No space left on device", "/data/out/scored")
    assert is_user_mistake(error)
    assert one_line(error) == "/data/out/scored: No space left on device"


def test_a_full_disk_is_a_mistake_even_where_the_write_does_not_name_its_file():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert is_user_mistake(error)
    assert one_line(error) == "No space left on device"


def test_a_full_disk_behind_another_error_ends_a_command_in_one_line(capsys, monkeypatch):
    def main(_: object) -> None:
        try:
            with open("/dev/full", "w") as file:
                file.write("x")
        except OSError as error:
            raise RuntimeError("checkpoint not written") from error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_options_and_overrides_come_in_any_order():
    parser = CommandParser(prog="x")
    parser.add_argument("--pct", type=float)
    options, overrides = parse_arguments(parser, ["a=1", "--pct", "0.5", "b.c=x y"])
    assert (options.pct, overrides) == (0.5, ["a=1", "b.c=x y"])


def test_an_option_of_several_values_leaves_overrides_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2026").mkdir()
    parser = CommandParser(prog="x")
    parser.add_argument("--data", nargs="+")
    arguments = ["--data", "a.jsonl", "s3://b/c.jsonl?region=d", "year=2026", "seed=1", "f.g=h/i"]
    options, overrides = parse_arguments(parser, arguments)
    assert options.data == ["a.jsonl", "s3://b/c.jsonl?region=d", "year=2026"]
    assert overrides == ["seed=1", "f.g=h/i"]


def test_an_unknown_option_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(CommandParser(prog="jobs/select.py"), ["--pctt", "1"])
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--pctt" in line


def test_names_cannot_move_the_cursor_or_break_a_line():
    assert printable("a\x1b[2Jb\r\nc\x85d\u202ee") == "a\\x1b[2Jb\\r\\nc\\x85d\\u202ee"
    assert printable("Grüße 数据 👩\u200d🔬") == "Grüße 数据 👩\u200d🔬"
    assert format_table([("dataset", "read"), ("a\nb", "1")]).splitlines() == [
        "dataset  read",
        "a\\nb        1",
    ]
    error = DataError("\x1b]0;title\x07: no rows")
    assert one_line(error) == "\\x1b]0;title\\x07: no rows"


def test_sigterm_ends_the_command_like_ctrl_c(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("sys.argv", ["selectmoe", "--version"])
    try:
        with pytest.raises(SystemExit):
            main()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.startswith("selectmoe ")
