"""jobs/pretrain.py up to the point where Ray would start."""

import json

import pytest

from jobs.on_ray.training_run import claimed_output, print_report
from jobs.stage_1_pretrain.command import (
    calibration_line,
    gates_lines,
    parse,
    require_inputs,
)
from selectmoe.errors import ConfigError, DataError, ModelError, ResumeError
from selectmoe.training.metrics_lines import metrics_line
from selectmoe.training.tokenized_rows import TokenizedSummary
from tests.tiny_target import save_tiny_llama


def test_options_and_overrides_become_one_configuration_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse([
        "--data", "a.jsonl", "hub:b/c", "--num-workers", "2", "dataset.folder=corpora",
        "dataset.names=cot,dolly", "scaling.storage_path=s3://bucket/runs", "training.lora.r=4",
    ])  # fmt: skip
    assert config.dataset.paths == (str(tmp_path / "a.jsonl"), "hub:b/c")
    assert config.dataset.folder == str(tmp_path / "corpora")
    assert config.dataset.names == ("cot", "dolly")
    assert config.scaling.num_workers == 2
    assert config.scaling.storage_path == "s3://bucket/runs"
    assert config.training.lora.r == 4


def test_the_presets_are_configurations():
    original = parse(["preset=original"])
    assert original.training.learning_rate == 1e-4
    assert original.training.quality_loss_type == "sigmoid"
    assert original.training.train_moe_gates
    assert original.dataset.subset_ratio == 0.05
    assert parse(["preset=demo"]).dataset.subset_ratio == 1.0


def test_without_a_model_and_a_corpus_the_demo_preset_is_what_overrides_stand_on():
    config = parse(["training.num_steps=7"])
    assert config.dataset.subset_ratio == 1.0
    assert config.training.num_steps == 7
    assert parse(["--model", "a/b"]).dataset.subset_ratio == 0.05
    assert parse(["preset=original"]).dataset.subset_ratio == 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.effective_batch_size=1", "scaling.num_workers=2"],
            r"at least scaling\.num_workers = 2",
        ),
        (
            ["training.strategy=single"],
            r"ddp or fsdp \(scaling\.num_workers=1 is",
        ),
        (["training.strategy=fsdp", "scaling.num_workers=1"], r"num_workers at least 2, got 1"),
        (["training.train_quality_gates=false"], "nothing would be trained"),
        (["training.num_steps=0"], r"training\.num_steps must be at least 1"),
        (["training.label_weight=1.5"], r"label_weight must be in \[0, 1\], got 1.5"),
        (["training.peft_mode=qlora"], "full_rank, lora"),
        (["training.learning_rat=1"], r"did you mean 'training\.learning_rate'"),
        (["scaling.num_workers=0"], "at least 1, got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(overrides)


def test_inputs_that_are_not_there_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="model folder nowhere/at/all does not exist"):
        require_inputs(parse(["--model", "nowhere/at/all"]))
    with pytest.raises(DataError, match="no such file or folder"):
        require_inputs(parse(["--data", str(tmp_path / "nothing.jsonl")]))
    (tmp_path / "cot.jsonl").touch()
    names = [f"dataset.folder={tmp_path}", "dataset.names=dolly"]
    with pytest.raises(DataError, match="'dolly' must be a folder or one file"):
        require_inputs(parse(names))
    with pytest.raises(ConfigError, match="got 'sarcasm'"):
        require_inputs(parse(["training.corruptions=sarcasm"]))


def test_a_run_is_resumed_with_its_settings_and_refused_with_others(tmp_path):
    output = tmp_path / "run"
    first = parse(
        ["--output", str(output), "training.num_steps=7", "max_rejected=0.5", "--num-workers", "2"]
    )
    with claimed_output(first):
        pass
    again = parse(["--resume", str(output)])
    assert again.training.num_steps == 7
    assert again.max_rejected == 0.5
    assert again.scaling.num_workers == 2
    with claimed_output(again) as folder:
        assert folder == output
    other = parse(["--resume", str(output), "training.learning_rate=0.5"])
    refusal = pytest.raises(
        ResumeError, match=r"training\.learning_rate is 0\.005 there and 0\.5 here"
    )
    with refusal, claimed_output(other):
        pass
    with claimed_output(parse(["--resume", str(output), "--num-workers", "3"])):
        pass
    assert parse(["--resume", str(output)]).scaling.num_workers == 3
    saved = json.loads((output / "config.json").read_text())
    assert saved["scaling.storage_path"] is None


def test_a_line_of_metrics_says_what_a_person_looks_for():
    row = {
        "step": 40, "num_steps": 1_500, "loss": 0.5, "label_loss": 0.6, "grad_norm": 0.3,
        "good_probability": 0.8, "good_probability_layer_00": 0.7, "margin_spread": 1.0,
        "good_probability_layer_01": 0.9, "pairs_in_order": 0.75, "tokens_per_second": 12_345.6,
    }  # fmt: skip
    assert metrics_line(row) == (
        "step 40 of 1,500: loss 0.5000, label loss 0.6000, gradient 0.3, good 0.800 (by layer "
        "0.700-0.900), pairs in order 75%, 12,346 tokens/s"
    )


def test_the_report_says_what_the_run_did(capsys):
    summary = TokenizedSummary(
        fingerprint="", description="all rows of a.jsonl", num_read=1_203,
        num_rejected={"no_answer_token": 3}, num_rows=1_200, num_truncated=0, num_tokens=90_000,
        num_answer_tokens=60_000, max_tokens=512, rows_sha256="",
    )  # fmt: skip
    report = {"calibration": {"num_samples": 1_190}}
    uncalibrated = {"calibration": None, "calibration_failure": "the model has no tensor 'x'"}
    print_report(
        summary,
        ("scores", calibration_line(report)),
        ("scores", calibration_line(uncalibrated)),
        num_trained=65_600,
        num_steps=100,
        wall_seconds=42.0,
    )
    assert capsys.readouterr().out.splitlines() == [
        "rows     1,200 (3 rejected, all rows of a.jsonl)",
        "trained  65,600 parameters",
        "steps    100 in 42 s",
        "scores   calibrated on 1,190 rows of the corpus",
        "scores   not calibrated: the model has no tensor 'x'",
    ]


def test_a_base_is_taken_and_one_that_does_not_fit_is_refused_before_ray_starts(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    require_inputs(parse(["--model", str(base)]))
    with pytest.raises(ConfigError, match="must be below 2, the number of layers of the base"):
        require_inputs(parse(["--model", str(base), "training.layers=0,7"]))
    with pytest.raises(ConfigError, match="must be false for gates on a base, which only read"):
        require_inputs(parse(["--model", str(base), "preset=original"]))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"bert: (gates need|not a causal)"):
        require_inputs(parse(["--model", str(tmp_path / "bert")]))


def test_settings_of_gates_on_a_base_are_refused_for_a_select_moe():
    for setting, rule in (("layers=0", "must be all"), ("method=features", "must be steps")):
        with pytest.raises(ConfigError, match=rf"{rule} for a Select-MoE"):
            require_inputs(parse([f"training.{setting}"]))


def test_what_is_told_of_gates_on_a_base():
    features = {"phase": "features", "rows": 320, "num_rows": 600, "tokens_per_second": 1234.4}
    assert metrics_line(features) == "features: 320 of 600 rows with their copies, 1,234 tokens/s"
    chosen = {"phase": "layers", "first": 12, "last": 17, "num_layers": 30, "auroc": 0.8254}
    assert metrics_line(chosen).startswith("layers 12 to 17 of 30 chosen: AUROC 0.825 of held-out")
    report = {"layers": [12, 13], "num_copies": 1800, "fit_seconds": 3.21, "held_out_auroc": 0.8254}
    assert gates_lines(report) == [
        ("copies", "1,800"),
        ("gates", "on the layers 12, 13, fitted in 3.2 s"),
        ("AUROC", "0.825 of held-out rows against corrupted copies"),
    ]
    assert gates_lines({"num_steps": 7}) == []
