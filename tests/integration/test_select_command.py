"""jobs/select.py as a user runs it: real files, a real local Ray, kills and resumptions."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.scoring.calibration import describe
from selectmoe.scoring.engine import ScoringEngine

pytestmark = pytest.mark.timeout(300)


def selected(output: Path) -> bytes:
    return (output / "selected_data.jsonl").read_bytes()


def without_source(rows: bytes) -> bytes:
    """Where a row was read is all that the division into files may change."""
    return re.sub(rb', "source": "[^"]*"', b"", rows)


def manifest(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text("utf-8"))


def split(corpus: Path, folder: Path, num_files: int) -> Path:
    folder.mkdir()
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    for number in range(num_files):
        part = "".join(lines[number::num_files])
        (folder / f"part-{number}.jsonl").write_text(part, "utf-8")
    return folder


def test_a_run_on_ray_ends_with_a_report_whose_tokens_have_scores(finished):
    output, printed = finished
    assert str(output / "report.html") in printed.splitlines()
    report = (output / "report.html").read_text("utf-8")
    assert "24 of 120 rows kept" in report
    assert re.search(r"<i class=h\d title=0\.\d+>", report)


def test_exactly_k_are_kept_and_every_row_is_accounted_for(finished):
    output, printed = finished
    rows = [json.loads(line) for line in selected(output).splitlines()]
    assert len(rows) == 24
    counts = manifest(output)["total"]
    scored = pq.read_table(output / "scored").to_pydict()
    assert counts == {
        "num_read": 120,
        "num_scored": 120,
        "num_rejected": 0,
        "num_duplicates": 0,
        "num_left_out": 0,
        "num_selected": 24,
        "num_tokens": sum(scored["num_tokens"]),
        "num_truncated": sum(scored["truncated"]),
    }
    scores = scored["score"]
    kept = sorted(scores, reverse=True)[:24]
    assert sorted((row["score"] for row in rows), reverse=True) == pytest.approx(kept, abs=1e-7)
    calibration = ScoringEngine.from_pretrained(device="cpu").calibration
    percentiles = calibration.percentiles([row["score"] for row in rows]).tolist()
    assert [row["percentile"] for row in rows] == percentiles
    assert manifest(output)["thresholds"]["*"]["percentile"] == min(percentiles)
    assert manifest(output)["calibration"] == describe(calibration)
    assert f"threshold at percentile {min(percentiles):.1f} of " in printed
    assert "all" in printed.split()
    assert str(output / "selected_data.jsonl") in printed


def test_two_actors_and_a_corpus_in_other_files_give_the_same_bytes(
    select_here, corpus, finished, tmp_path
):
    folder = split(corpus, tmp_path / "parts", 7)
    select_here.run(
        "--pct", "0.2", "--data", folder, "--output", tmp_path / "run", "--num-actors", "2",
        "rows_per_shard=15",
    )  # fmt: skip
    assert without_source(selected(tmp_path / "run")) == without_source(selected(finished[0]))


def test_one_process_without_ray_gives_the_bytes_of_the_job(selectmoe, corpus, finished, tmp_path):
    output, job = tmp_path / "run", finished[0]
    arguments = ("--pct", "0.2", "--data", corpus, "--output", output, "rows_per_shard=15")
    status, printed, told = selectmoe("select", *arguments)
    assert status == 0, told
    assert selected(output) == selected(job)
    shards = sorted((job / "scored").glob("*.parquet"))
    assert shards
    for shard in shards:
        assert (output / "scored" / shard.name).read_bytes() == shard.read_bytes()
    assert str(output / "selected_data.jsonl") in printed
    assert "Traceback" not in told


def test_an_interrupted_job_is_resumed_in_one_process(selectmoe, finished, tmp_path):
    """To the same bytes; here one that was interrupted before its last shard."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    for name in ("manifest.json", "selected_data.jsonl", "scored/shard-000003.parquet"):
        (output / name).unlink()
    status, _, told = selectmoe("select", "--resume", output)
    assert status == 0, told
    assert "7 of 8 shards have scores already" in told
    assert selected(output) == selected(finished[0])
    assert manifest(output)["scoring"]["num_shards_reused"] == 7


def test_scores_are_cut_again_without_scoring(select_here, finished, tmp_path):
    select_here.run(
        "--scored", finished[0], "--pct", "0.1", "--per-dataset", "--output", tmp_path / "cut"
    )
    assert manifest(tmp_path / "cut")["calibration"] == manifest(finished[0])["calibration"]
    datasets = manifest(tmp_path / "cut")["datasets"]
    for counts in datasets.values():
        assert counts["num_selected"] == max(1, counts["num_scored"] // 10)


def wait_for_shards(output: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(list((output / "scored").glob("shard-*.parquet"))) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished_shards(output: Path) -> list[str]:
    lines = (output / "scored" / "_finished.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["shard"] for line in lines]


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_driver_resumes_to_the_same_bytes_and_scores_no_shard_twice(
    job, select_here, corpus, finished, tmp_path
):
    output = tmp_path / "run"
    process = job.start(
        "--pct", "0.2", "--data", corpus, "--output", output, "--num-actors", "1",
        "rows_per_shard=15",
    )  # fmt: skip
    wait_for_shards(output, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "selected_data.jsonl").exists()
    time.sleep(3)  # Ray notices that its driver is gone, and ends the actors
    num_before = len(list((output / "scored").glob("shard-*.parquet")))
    printed = select_here.run("--resume", output)
    assert selected(output) == selected(finished[0])
    assert sorted(finished_shards(output)) == [f"shard-{n:06d}.parquet" for n in range(8)]
    assert manifest(output)["scoring"]["num_shards_reused"] == num_before >= 2
    assert "have scores already" in printed


@pytest.mark.usefixtures("shared_ray")
def test_a_run_that_is_told_to_stop_says_how_to_go_on(job, corpus, tmp_path):
    output = tmp_path / "run"
    process = job.start("--data", corpus, "--output", output, "--num-actors", "1")
    deadline = time.monotonic() + 120
    while not (output / "corpus" / "summary.json").exists():  # Ray is ready
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # as `ray job stop` does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-2:] == [f"resume with --resume {output}", "interrupted"]
    assert "SIGTERM" not in printed


@pytest.mark.usefixtures("shared_ray")
def test_a_killed_actor_is_replaced_and_no_shard_is_scored_twice(job, corpus, finished, tmp_path):
    output = tmp_path / "run"
    process = job.start(
        "--pct", "0.2", "--data", corpus, "--output", output, "--num-actors", "1",
        "rows_per_shard=15",
    )  # fmt: skip
    wait_for_shards(output, 2, process)
    lines = (output / "scored" / "_finished.jsonl").read_text("utf-8").splitlines()
    os.kill(json.loads(lines[0])["process_id"], signal.SIGKILL)
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    assert selected(output) == selected(finished[0])
    assert sorted(finished_shards(output)) == [f"shard-{n:06d}.parquet" for n in range(8)]


def test_rejected_rows_stop_a_run_that_may_go_on_without_them(select_here, corpus, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text("utf-8") + '{"messages": []}\n{"mess', "utf-8")
    output = tmp_path / "run"
    line = select_here.refuse(
        "--pct", "0.5", "--data", broken, "--output", output, "--num-actors", "1"
    )
    assert "2 of 122 rows are rejected, more than max_rejected=0.01 allows" in line
    assert f"first: {broken}:121: 'messages' must not be empty" in line
    assert line.endswith(f"--resume {output} max_rejected=0.017")
    select_here.run("--resume", output, "max_rejected=0.017")
    lines = (output / "rejected" / "rejected.jsonl").read_text("utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (121, "messages_empty"),
        (122, "invalid_json"),
    ]
    assert all(row["file"] == str(broken) for row in rejected)
    assert manifest(output)["total"]["num_read"] == 122


def test_a_run_that_was_begun_with_other_weights_is_not_gone_on_with(select_here, corpus, tmp_path):
    selector = tmp_path / "selector"
    shutil.copytree(EMBEDDED_SELECTOR, selector)
    output = tmp_path / "run"
    arguments = ("--data", corpus, "--model", selector, "--output", output)
    (tmp_path / "empty.jsonl").touch()
    select_here.refuse(*arguments, "--data", tmp_path / "empty.jsonl")
    with (selector / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3f")
    assert "started with other weights" in select_here.refuse("--resume", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pct", "abc"), "invalid float value: 'abc'"),
        (("selection_percentge=0.1",), "did you mean 'selection_percentage'?"),
        (("pct=0.1",), "did you mean 'selection_percentage'?"),
        (("--data", "missing.jsonl"), "no such file or folder"),
        (("--model", "missing"), "model folder missing does not exist"),
        (("--scored", "nowhere"), "--scored must be the folder of a finished run"),
        (("--resume", "nowhere"), "no run to resume"),
        (("--output", "/proc/run"), "/proc/run: No such file or directory"),
        # On a worker, and one has it said sooner than two.
        (("scoring.attn_implementation=fast", "--num-actors", "1"), "is not supported"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(select_here, arguments, message):
    assert message in select_here.refuse(*arguments)


def test_a_mistake_ends_the_process_with_one_line_and_status_2(job):
    assert "selection_percentage (--pct) must be in (0, 1], got 5.0" in job.refuse("--pct", "5")


def test_an_output_folder_of_another_run_is_refused(select_here, corpus, finished):
    line = select_here.refuse("--pct", "0.3", "--data", corpus, "--output", finished[0])
    assert "holds a run with another configuration" in line


def test_help_answers_within_a_second(job):
    assert "selection_percentage" in job.run("--help")
    assert job.cpu_seconds_of_help() < 1
