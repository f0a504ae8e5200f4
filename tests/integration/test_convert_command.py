"""jobs/convert.py as a user runs it, from another folder than the checkout."""

import contextlib
import json
import resource
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe.cli.convert_command import main, require_memory
from selectmoe.errors import NotEnoughMemoryError
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.scoring.engine import ScoringEngine
from tests.command_here import CommandHere
from tests.tiny_olmoe import save_tiny_olmoe

pytestmark = pytest.mark.timeout(120)
EXPERT = "model.layers.0.mlp.experts.2.down_proj.weight"


@pytest.fixture
def base(tmp_path):
    return save_tiny_olmoe(tmp_path / "base", dtype=torch.bfloat16, layout="sharded")


def report_of(folder):
    return json.loads((folder / "parity_report.json").read_text())


def test_it_converts_verifies_prints_and_stores_the_report(make_job, base, tmp_path):
    process = subprocess.run(
        [*make_job("convert").command, "--base", "base", "--save-path", "out/new", "--verify",
         "seed=3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    printed = process.stdout
    assert process.returncode == 0, printed + process.stderr
    assert process.stderr == ""  # no progress bars, no load reports
    assert "2 layers with 4 experts, bfloat16" in printed
    assert "45 of 45 base tensors are bit-identical" in printed
    assert "parity: yes" in printed
    new = tmp_path / "out" / "new"
    assert str(new / "parity_report.json") in printed
    report = report_of(new)
    assert report["passed"] is True
    assert report["base"] == str(base)
    assert report["by_dtype"]["float32"]["forced_open_max_difference"] <= 1e-5
    assert json.loads((new / "config.json").read_text())["model_type"] == "select_moe"


def test_a_tampered_checkpoint_ends_with_another_status_and_a_report_of_it(base, tmp_path):
    convert_here = CommandHere(tmp_path, "convert")
    convert_here.run("--base", base, "--save-path", "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    weights[EXPERT] *= 2
    save_file(weights, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    status, printed = convert_here.call("--base", base, "--save-path", "new", "--verify-only")
    assert status == 2
    assert "parity: NO" in printed
    assert f"1 of 45 tensors differ, the first is '{EXPERT}'" in printed.splitlines()[-1]
    assert report_of(tmp_path / "new")["different_tensors"] == [EXPERT]
    assert report_of(tmp_path / "new")["passed"] is False


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Writing more fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_nothing_behind(base, tmp_path):
    convert_here = CommandHere(tmp_path, "convert")
    with files_of_at_most(50_000):
        line = convert_here.refuse("--base", base, "--save-path", "new")
    assert "save_path" in line
    assert "cannot be written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_mistake_is_one_line(complaint, base, tmp_path):
    shutil.copytree(base, tmp_path / "spoiled")
    next((tmp_path / "spoiled").glob("*-00002-of-*")).write_bytes(b"no weights")
    for arguments, message in (
        ((), "base and save_path must be given: --base BASE --save-path SAVE_PATH"),
        (("--base", "base"), "save_path must be given: --save-path SAVE_PATH"),
        (("--base", "nowhere", "--save-path", "new"), "model folder nowhere does not exist"),
        (("--base", "base", "--save-path", "base/new"), "must lie outside base"),
        (("--base", "spoiled", "--save-path", "new"), "not a readable weights file"),
    ):
        assert message in complaint(main, *arguments)
    assert not (tmp_path / "new").exists()


def test_weights_of_stage_1_are_merged_by_the_command(base, tmp_path):
    convert_here = CommandHere(tmp_path, "convert")
    convert_here.run("--base", base, "--save-path", "new")
    model = SelectMoeForCausalLM.from_pretrained(tmp_path / "new")
    save_gate_weights(model, tmp_path / "warm")
    printed = convert_here.run(
        "--base", "new", "--merge-weights", "warm", "--save-path", "merged", "--remote-code"
    )
    assert str(tmp_path / "warm" / "full_rank_weights.safetensors") in printed
    assert (tmp_path / "merged" / "modeling_select_moe.py").is_file()


def test_verification_says_first_what_memory_it_needs(base, tmp_path):
    convert_here = CommandHere(tmp_path, "convert")
    printed = convert_here.run("--base", base, "--save-path", "new", "--verify")
    assert printed.startswith("memory     verifying needs at least ")
    assert printed.index("memory ") < printed.index("copied ")
    with pytest.raises(
        NotEnoughMemoryError, match=r"at least 28\.0 GB .*, and 16\.0 GB are free: c"
    ):
        require_memory("base", needed=28_000_000_000, free=16_000_000_000)


def test_what_contradicts_itself_is_refused_before_the_work_begins(complaint, base, tmp_path):
    common = ("--base", str(base), "--save-path", str(tmp_path / "new"))
    for arguments, message in (
        (("--merge-weights", "gone"), "must be a weights file or a folder with"),
        (("--merge-weights", str(base), "--verify"), "cannot be combined with merge_weights"),
        (("--push-to-hub", "a/b/c"), "push_to_hub must be NAME or OWNER/NAME"),
    ):
        assert message in complaint(main, *common, *arguments)
    save_gate_weights(ScoringEngine.from_pretrained(device="cpu").model, tmp_path / "warm")
    bias = ("--merge-weights", str(tmp_path / "warm"), "quality_gate_init_bias=1")
    assert "is a setting of new gates" in complaint(main, *common, *bias)
    assert not (tmp_path / "new").exists()


def test_help_answers_within_a_second(make_job):
    assert "quality_gate_init_bias" in make_job("convert").run("--help")
    assert make_job("convert").cpu_seconds_of_help() < 1
