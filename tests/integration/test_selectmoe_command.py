"""The command `selectmoe` as a user types it: one process, no Ray."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def command(repository, tmp_path):
    """Runs `python -m selectmoe` in another folder; returns status, standard output and error."""

    def run(*arguments: object, script: str = "") -> tuple[int, str, str]:
        program = ["-c", script] if script else ["-m", "selectmoe"]
        process = subprocess.run(
            [sys.executable, *program, *map(str, arguments)],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        return process.returncode, process.stdout, process.stderr

    return run


def test_one_process_gives_the_bytes_of_the_job_on_ray(command, corpus, finished, tmp_path):
    output = tmp_path / "run"
    arguments = ("--pct", "0.2", "--data", corpus, "--output", output, "rows_per_shard=15")
    status, printed, told = command("select", *arguments)
    assert status == 0, told
    job = finished[0]
    assert (output / "selected_data.jsonl").read_bytes() == (
        job / "selected_data.jsonl"
    ).read_bytes()
    shards = sorted((job / "scored").glob("*.parquet"))
    assert shards
    for shard in shards:
        assert (output / "scored" / shard.name).read_bytes() == shard.read_bytes()
    assert str(output / "selected_data.jsonl") in printed
    assert "Traceback" not in told


def test_an_interrupted_job_is_resumed_in_one_process(command, corpus, finished, tmp_path):
    """And by the same bytes; here one whose last shards are missing."""
    output = tmp_path / "run"
    arguments = ("--pct", "0.2", "--data", corpus, "--output", output, "rows_per_shard=15")
    assert command("select", *arguments)[0] == 0
    selected = (output / "selected_data.jsonl").read_bytes()
    for name in ("manifest.json", "selected_data.jsonl", "scored/shard-000003.parquet"):
        (output / name).unlink()
    status, _, told = command("select", "--resume", output)
    assert status == 0
    assert "7 of 8 shards have scores already" in told
    assert (output / "selected_data.jsonl").read_bytes() == selected
    assert json.loads((output / "manifest.json").read_text())["scoring"]["num_shards_reused"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("selct",), "unknown command 'selct'; choose one of select, score, convert, info"),
        (("select", "--pct", "5"), "selection_percentage (--pct) must be in (0, 1], got 5.0"),
        (("select", "--data", "missing.jsonl"), "missing.jsonl: no such file or folder"),
        (("select", "--via", "serve"), "via=serve needs Ray: python jobs/select.py --via serve"),
        (("score",), "no rows to score"),
        (("info", "--model", "missing"), "model folder missing does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, arguments, message):
    status, printed, told = command(*arguments)
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
def test_what_is_not_installed_is_one_line_with_the_extra(command, missing, arguments, extra):
    script = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'selectmoe'\n"
        "from selectmoe.cli.main import main; main()"
    )
    status, _, told = command(*arguments, script=script)
    assert status == 2
    [line] = told.splitlines()
    assert f"pip install '{extra}'" in line


def test_info_answers_without_a_model(command):
    status, printed, _ = command("info")
    assert status == 0
    assert "extras installed" in printed
