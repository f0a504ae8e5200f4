"""The command `selectmoe` as a user types it; test_select_command.py has whole runs of it."""

import pytest

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("selct",),
            "unknown command 'selct'; choose one of select, report, score, calibrate,",
        ),
        (("select", "--pct", "5"), "selection_percentage (--pct) must be in (0, 1], got 5.0"),
        (("select", "--data", "missing.jsonl"), "missing.jsonl: no such file or folder"),
        (("select", "--via", "serve"), "via=serve needs Ray: python jobs/select.py --via serve"),
        (("score",), "no rows to score"),
        (("info", "--model", "missing"), "model folder missing does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(selectmoe, arguments, message):
    status, printed, told = selectmoe(*arguments)
    assert (status, printed) == (2, "")
    [line] = told.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("datasets", ("select", "--data", "hub:org/name"), "selectmoe[hub]"),
        ("httpx", ("select", "--via", "http://127.0.0.1:9"), "selectmoe[client]"),
    ],
)
def test_what_is_not_installed_is_one_line_with_the_extra(selectmoe, missing, arguments, extra):
    script = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'selectmoe'\n"
        "from selectmoe.cli.main import main; main()"
    )
    status, _, told = selectmoe(*arguments, script=script)
    assert status == 2
    [line] = told.splitlines()
    assert f"pip install '{extra}'" in line


def test_info_answers_without_a_model(selectmoe):
    status, printed, _ = selectmoe("info")
    assert status == 0
    assert "extras installed" in printed
