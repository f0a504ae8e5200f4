"""Gates on a base, by features that are computed once: dense and mixture-of-experts bases, several
workers, resumption, the layers, the selector folder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig, layer_numbers
from selectmoe.errors import ConfigError, DataError, ModelError, TrainingStoppedError
from selectmoe.model.attached_gates import attach_gates, load_gates
from selectmoe.model.gates_config import read_gates_config
from selectmoe.scoring.calibration import load_calibration
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.base_model import is_base, require_base
from selectmoe.warmup.base_stage import compute_features, feature_work, run_base_warmup
from selectmoe.warmup.feature_shards import load_features, shard_file
from selectmoe.warmup.gate_features import gate_features
from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_target import save_tiny_llama

NUM_LAYERS = 4
SETTINGS = {
    "dataset.subset_ratio": 0.2, "dataset.max_sequence_length": 96, "max_rejected": 1.0,
    "training.num_copies": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def base(request, tmp_path_factory):
    save = {"llama": save_tiny_llama, "olmoe": save_tiny_olmoe}[request.param]
    return save(tmp_path_factory.mktemp(request.param) / "base", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama") / "base", num_hidden_layers=NUM_LAYERS)


def configured(model, **settings) -> WarmupConfig:
    return from_values(WarmupConfig, {**SETTINGS, "model": str(model), **settings})


def prepared(config, folder, **settings) -> TrainingWorker:
    prepare_warmup_rows(config, warmup_tokenizer(config), folder)
    return TrainingWorker(output=folder, scratch=folder / "scratch", **settings)


def warm_up(model, folder, **settings):
    config = configured(model, **settings)
    return run_base_warmup(config, prepared(config, folder))


def test_the_selector_folder_scores_held_out_rows_above_copies_on_any_base(base, tmp_path):
    report = warm_up(base, tmp_path)
    # Random weights know little; two thirds of the copies have other letters or other lengths.
    assert report.held_out_auroc > 0.6
    config = read_gates_config(tmp_path)
    assert config.base == str(base)
    assert list(config.layers) == report.layers
    calibration = load_calibration(tmp_path)
    assert calibration.num_samples <= len(
        feature_work(configured(base), worker(tmp_path)).rows.samples
    )
    assert report.calibration["num_samples"] == calibration.num_samples


def worker(folder) -> TrainingWorker:
    return TrainingWorker(output=folder, scratch=folder / "scratch")


def test_margins_of_the_saved_gates_are_those_of_the_features(base, tmp_path):
    warm_up(base, tmp_path, **{"training.layers": "1,2"})
    work = feature_work(configured(base), worker(tmp_path))
    features = load_features(work)
    assert features.rows_NLH.shape[1] == 2  # what is not asked for is not computed
    gates = load_gates(tmp_path)
    attached = attach_gates(AutoModelForCausalLM.from_pretrained(base), gates)
    weights_LH = gates.weights_L2H[:, 0] - gates.weights_L2H[:, 1]
    biases_L = gates.biases_L2[:, 0] - gates.biases_L2[:, 1]
    for row, features_LH in zip(work.rows.tokenized[:8], features.rows_NLH, strict=False):
        with torch.inference_mode():
            margins_LT = attached.margins(torch.tensor(row.token_ids)[None].long())[:, 0]
        answer_T = torch.tensor(row.answer_mask)
        expected = (torch.from_numpy(features_LH) * weights_LH).sum(1) + biases_L
        # float32 sums over a hundred tokens
        torch.testing.assert_close(margins_LT[:, answer_T].mean(1), expected, atol=1e-4, rtol=1e-4)


def test_two_workers_and_an_interrupted_run_give_the_gates_of_one(llama, tmp_path):
    warm_up(llama, tmp_path / "one")
    config = configured(llama)
    other = prepared(config, tmp_path / "two", num_workers=2, rank=1)
    assert run_base_warmup(config, other) is None  # rank 1 computes its share and ends
    written = {
        path.name: path.stat().st_mtime_ns for path in shard_file(other.output, 0).parent.iterdir()
    }
    assert len(written) >= 1
    run_base_warmup(config, dataclasses.replace(other, rank=0))
    again = {
        name: shard_file(other.output, 0).with_name(name).stat().st_mtime_ns for name in written
    }
    assert again == written  # none is computed twice
    one, two = (load_file(tmp_path / name / "gates.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=0)


def test_a_finished_run_computes_no_feature_again(llama, tmp_path):
    config = configured(llama)
    started = prepared(config, tmp_path)
    run_base_warmup(config, started)
    # A base without weights: whoever computed anything would need them.
    compute_features(feature_work(config, started), config.training, started, model="gone")


def test_layers_are_chosen_by_held_out_copies_and_written_down(llama, tmp_path):
    report = warm_up(llama, tmp_path)
    tried = json.loads((tmp_path / "layers.json").read_text("utf-8"))
    assert len(tried) == NUM_LAYERS * (NUM_LAYERS + 1) // 2
    [chosen] = [
        w for w in tried if [w["first"], w["last"]] == [report.layers[0], report.layers[-1]]
    ]
    assert chosen["auroc"] >= max(window["auroc"] for window in tried) - 0.01
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line["phase"] for line in lines][-2:] == ["layers", "gates"]
    assert warm_up(llama, tmp_path / "all", **{"training.layers": "all"}).layers == [0, 1, 2, 3]


def test_features_stop_below_what_no_gate_reads(llama, tmp_path):
    work = feature_work(configured(llama), prepared(configured(llama), tmp_path))
    model = AutoModelForCausalLM.from_pretrained(llama)
    features_NLH = gate_features(model, work.rows.tokenized[:3])
    assert features_NLH.shape == (3, NUM_LAYERS, model.config.hidden_size)
    model.model.norm = None  # nothing above the last feed-forward input is called
    model.model.layers[-1].mlp.gate_proj = None
    np.testing.assert_array_equal(gate_features(model, work.rows.tokenized[:3]), features_NLH)


def test_a_base_that_computes_no_numbers_is_told_with_the_samples(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    broken = save_tiny_llama(tmp_path / "broken", num_hidden_layers=NUM_LAYERS)
    model.save_pretrained(broken)
    with pytest.raises(TrainingStoppedError, match="not finite numbers for the samples 'demo-"):
        warm_up(broken, tmp_path / "run")


def test_too_few_rows_are_refused(llama, tmp_path):
    with pytest.raises(DataError, match="at least 10 rows that can be corrupted, got"):
        warm_up(llama, tmp_path, **{"dataset.subset_ratio": 0.01})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.quality_loss_type": "sigmoid"}, "quality_loss_type must be contrastive"),
        ({"training.peft_mode": "lora"}, "peft_mode must be full_rank"),
        ({"training.train_moe_gates": True}, "train_moe_gates must be false"),
        ({"training.trash_expert_mode": "noise"}, "trash_expert_mode must be null"),
        ({"training.layers": "2,9"}, "must be below 4, the number of layers of the base, got 9"),
        ({"training.method": "steps", "training.layers": "auto"}, "needs training.method=features"),
    ],
)
def test_settings_that_gates_on_a_base_cannot_have_are_refused(llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        require_base(str(llama), configured(llama, **settings).training)


def test_a_model_without_decoder_layers_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").touch()
    assert is_base(str(tmp_path))
    with pytest.raises(ModelError) as refusal:
        require_base(str(tmp_path), configured(tmp_path).training)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_layers_are_given_by_numbers_and_spans():
    assert layer_numbers("12,14") == (12, 14)
    assert layer_numbers("[3, 1-2]") == (1, 2, 3)
    for wrong in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(ConfigError, match="layers must be all, auto, or a list as"):
            layer_numbers(wrong)
