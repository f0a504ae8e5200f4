"""The quick form of the benchmarks that take seconds; `make bench FLAGS=--quick` runs all."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "key"), [("bench_stages", "512_rows_per_shard"), ("bench_training", "time_ratios")]
)
def test_a_quick_run_prints_numbers_and_keeps_no_file(repository, name, key):
    file = repository / "benchmarks" / "results" / f"{name}.json"
    before = file.read_bytes() if file.is_file() else None
    script = repository / "benchmarks" / f"{name}.py"
    finished = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)[key]
    assert (file.read_bytes() if file.is_file() else None) == before
