import json
import logging
import re
from pathlib import Path

import pytest

from selectmoe.cli.output_folder import (
    absolute_corpus,
    absolute_model,
    absolute_path,
    claim_output_folder,
    claimed_run,
    new_output_folder,
    saved_settings,
    telling_how_to_resume,
    values_given,
)
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError, ResumeError, StorageError

SETTINGS = {"selection_percentage": 0.05, "model": None}


def test_a_run_lies_under_its_stage_date_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SELECTMOE_OUTPUT_ROOT", raising=False)
    folder = new_output_folder("stage_2_selection", output=None, output_root=None)
    relative = folder.relative_to(tmp_path / "outputs").as_posix()
    assert re.fullmatch(r"stage_2_selection/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", relative)


def test_the_setting_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTMOE_OUTPUT_ROOT", str(tmp_path / "environment"))
    by_environment = new_output_folder("s", output=None, output_root=None)
    by_setting = new_output_folder("s", output=None, output_root=str(tmp_path / "setting"))
    assert by_environment.is_relative_to(tmp_path / "environment")
    assert by_setting.is_relative_to(tmp_path / "setting")


def test_outputs_never_land_in_an_uploaded_folder(tmp_path, monkeypatch):
    upload = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SELECTMOE_OUTPUT_ROOT", raising=False)
    folder = new_output_folder("s", output=None, output_root=None)
    assert folder.is_relative_to(tmp_path / "home" / "selectmoe_outputs")
    with pytest.raises(ConfigError, match=r"--data must be an absolute path .* got 'corpus'"):
        absolute_path("corpus", "--data")


def test_a_new_folder_keeps_the_settings_and_the_same_run_may_resume(tmp_path):
    claim_output_folder(tmp_path / "run", SETTINGS, resume=False)
    claim_output_folder(tmp_path / "run", SETTINGS, resume=True)


def test_a_folder_is_never_shared_by_two_runs(tmp_path):
    run = tmp_path / "run"
    claim_output_folder(run, SETTINGS, resume=False)
    with pytest.raises(ResumeError, match=f"resume with --resume {run}"):
        claim_output_folder(run, SETTINGS, resume=False)
    with pytest.raises(ResumeError, match=r"selection_percentage is 0\.05 there and 0\.1 here"):
        claim_output_folder(run, SETTINGS | {"selection_percentage": 0.1}, resume=True)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ResumeError, match=r"not empty and has no config\.json"):
        claim_output_folder(tmp_path, SETTINGS, resume=False)


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    with pytest.raises(ResumeError, match="nothing to resume"):
        claim_output_folder(tmp_path, SETTINGS, resume=True)


def test_only_what_lies_in_files_here_becomes_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute_model("model", "--model") == str(tmp_path / "model")
    assert absolute_model("someone/model", "--model") == "someone/model"
    assert absolute_corpus("corpus", "--data") == str(tmp_path / "corpus")
    for elsewhere in ("hub:someone/corpus", "s3://bucket/corpus.jsonl"):
        assert absolute_corpus(elsewhere, "--data") == elsewhere


def test_options_stand_over_the_settings_of_the_run_that_is_resumed(tmp_path):
    claim_output_folder(tmp_path, {"model": "old", "per_dataset": True}, resume=False)
    options = {"model": "new", "per_dataset": None}
    assert values_given(options, SelectConfig) == {"model": "new"}
    values = values_given({**options, "resume": str(tmp_path)}, SelectConfig)
    resumed = {"resume": str(tmp_path), "output": str(tmp_path)}
    assert values == {"model": "new", "per_dataset": True, **resumed}


def test_a_run_of_another_stage_is_not_resumed(tmp_path):
    saved = {"model": None, "training.dtype": None, "training.num_steps": 7}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ResumeError) as refused:
        values_given({"resume": str(tmp_path)}, SelectConfig)
    assert "no run of stage_2_selection to resume" in str(refused.value)
    unknown = "has 'training.dtype', 'training.num_steps', which this stage does not have"
    assert unknown in str(refused.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not the settings of a run: it is empty"),
        ('{"pct": 0.', "not the settings of a run: not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
    ],
)
def test_settings_that_cannot_be_read_are_refused_by_file_and_reason(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ResumeError, match=rf"{tmp_path}/config\.json: .*{reason}"):
        claim_output_folder(tmp_path, SETTINGS, resume=True)
    with pytest.raises(ResumeError, match=reason):
        saved_settings(tmp_path)


def test_the_folder_of_a_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["OlmoeForCausalLM"]}')
    with pytest.raises(ResumeError, match=r"not empty, and its config\.json is of no run"):
        claim_output_folder(tmp_path, SETTINGS, resume=False)


def test_whoever_interrupts_a_run_is_told_how_to_go_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "selectmoe")
    with pytest.raises(KeyboardInterrupt), telling_how_to_resume(tmp_path):
        raise KeyboardInterrupt
    assert caplog.messages == [f"resume with --resume {tmp_path}"]


def test_a_full_disk_ends_a_run_with_one_line_that_says_how_to_resume(tmp_path):
    with pytest.raises(StorageError) as stopped, telling_how_to_resume(tmp_path):
        Path("/dev/full").write_text("x" * 100_000)
    assert str(stopped.value) == (
        f"{tmp_path}: No space left on device; free some space, then resume with "
        f"--resume {tmp_path}"
    )
    # As safetensors and torch report it: in words alone.
    with pytest.raises(StorageError, match="No space left"), telling_how_to_resume(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: (os error 28)")


def test_a_run_has_its_folder_for_itself_until_it_ends(tmp_path):
    config = SelectConfig(output=str(tmp_path / "run"))
    with claimed_run(config, free=["output"], resume=False) as output:
        second = claimed_run(config, free=["output"], resume=True)
        with pytest.raises(ResumeError, match=f"{output}: this run is running: process "), second:
            pass
    with claimed_run(config, free=["output"], resume=True):
        pass
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_what_may_change_holds_for_a_resumed_run_until_it_is_changed(tmp_path):
    claim_output_folder(tmp_path, {"via": "http://a", "pct": 1}, resume=False, changeable=["via"])
    assert saved_settings(tmp_path)["via"] == "http://a"
    claim_output_folder(tmp_path, {"via": "serve", "pct": 1}, resume=True, changeable=["via"])
    assert saved_settings(tmp_path)["via"] == "serve"
    with pytest.raises(ResumeError, match="pct is 1 there and 2 here"):
        claim_output_folder(tmp_path, {"via": "serve", "pct": 2}, resume=True, changeable=["via"])
