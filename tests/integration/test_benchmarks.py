"""Quick runs of the fastest benchmarks; `make bench FLAGS=--quick` runs all."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "line"),
    [("bench_stages", "\n512 rows per shard:"), ("bench_training", "\ntime ratios ")],
)
def test_a_quick_run_prints_results_and_writes_no_file(repository, name, line):
    file = repository / "benchmarks" / "results" / f"{name}.json"
    before = file.read_bytes() if file.is_file() else None
    script = repository / "benchmarks" / f"{name}.py"
    finished = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert line in finished.stdout
    assert finished.stderr == ""
    assert (file.read_bytes() if file.is_file() else None) == before
