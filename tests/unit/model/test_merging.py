"""A folder with stage 1's weights merged into it scores as model and weights together do."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from selectmoe.errors import ConfigError, ModelError
from selectmoe.model.conversion import convert_olmoe
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.merging import merge_weights
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.records import Message, Sample
from selectmoe.scoring.calibration import calibrate, carry_over_calibration, save_calibration
from selectmoe.scoring.engine import ScoringEngine
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_target import save_tiny_llama

# PEFT asks transformers by a name that it has given up; nothing of ours causes it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
SAMPLES = [
    Sample("d", str(n), (Message("user", "is it open"), Message("assistant", "the gate " * n)))
    for n in range(1, 6)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return save_tiny_olmoe(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def selector(base, tmp_path_factory):
    return convert_olmoe(base, tmp_path_factory.mktemp("selector") / "new").folder


@pytest.fixture(scope="module")
def gates(selector, tmp_path_factory):
    """Trained gates, as stage 1 saves them: float32 beside a bfloat16 model."""
    model = SelectMoeForCausalLM.from_pretrained(selector, dtype=torch.float32)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "gate." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("gates")
    save_gate_weights(model, folder)
    return folder


def scores(model, dtype, weights=None):
    engine = ScoringEngine.from_pretrained(model, model_checkpoint_path=weights, dtype=dtype)
    return np.array([outcome.score for outcome in engine.score(SAMPLES)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_gates_give_the_scores_of_model_and_weights(selector, gates, tmp_path, dtype):
    merged = merge_weights(selector, gates, tmp_path / "merged").folder
    together = scores(selector, dtype, gates)
    assert np.array_equal(scores(merged, dtype), together)
    assert not np.array_equal(scores(selector, dtype), together)
    tensors = load_file(merged / "model.safetensors")
    assert tensors["model.layers.0.mlp.quality_gate.weight"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16


def test_gates_are_merged_into_an_olmoe_as_into_its_converted_model(
    base, selector, gates, tmp_path
):
    merged = merge_weights(base, gates, tmp_path / "merged", remote_code=True).folder
    assert np.array_equal(scores(merged, "float32"), scores(selector, "float32", gates))
    # A folder that is merged once more keeps its dtype and its code.
    again = merge_weights(merged, gates, tmp_path / "again").folder
    assert load_file(again / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert (again / "modeling_select_moe.py").is_file()


def test_a_merged_adapter_gives_the_scores_of_model_and_adapter(selector, tmp_path):
    model = SelectMoeForCausalLM.from_pretrained(selector)
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        modules_to_save=["quality_gate"],
    )  # fmt: skip
    get_peft_model(model, settings).save_pretrained(tmp_path / "warm" / "adapter")
    merged = merge_weights(selector, tmp_path / "warm", tmp_path / "merged").folder
    expected, found = (
        ScoringEngine.from_pretrained(
            folder, model_checkpoint_path=weights, dtype="bfloat16"
        ).model.state_dict()
        for folder, weights in ((selector, tmp_path / "warm"), (merged, None))
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # The merged weights are rounded to bfloat16, which has 8 bits.
    np.testing.assert_allclose(
        scores(merged, "float32"), scores(selector, "float32", tmp_path / "warm"), rtol=2e-2
    )


def test_a_calibration_of_these_weights_is_carried_over(selector, gates, tmp_path):
    engine = ScoringEngine.from_pretrained(selector, model_checkpoint_path=gates)
    calibration = calibrate(
        np.linspace(-3, 3, 2_000), np.arange(1, 2_001), config=engine.config,
        max_sequence_length=64, weights_hash=engine.weights_hash(), corpus={"d": 2_000},
    )  # fmt: skip
    save_calibration(gates, calibration)
    merged = merge_weights(selector, gates, tmp_path / "merged").folder
    file = gates / "full_rank_weights.safetensors"
    assert carry_over_calibration(str(selector), file, merged) is True
    found = ScoringEngine.from_pretrained(merged).calibration
    assert found is not None
    assert np.array_equal(found.quantiles, calibration.quantiles)
    other = convert_olmoe(save_tiny_olmoe(tmp_path / "b"), tmp_path / "other", seed=5).folder
    assert carry_over_calibration(str(other), file, merged) is False


def test_the_model_card_says_that_the_gates_are_trained(selector, gates, tmp_path):
    card = (merge_weights(selector, gates, tmp_path / "m").folder / "README.md").read_text("utf-8")
    assert "trained by stage 1 and merged into this folder" in card


def test_weights_of_another_model_and_another_base_are_refused(gates, tmp_path):
    other = save_tiny_olmoe(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ModelError, match="the model has no tensor"):
        merge_weights(other, gates, tmp_path / "merged")
    with pytest.raises(ModelError, match="into a Select-MoE or an OLMoE: model_type is 'llama'"):
        merge_weights(save_tiny_llama(tmp_path / "llama"), gates, tmp_path / "merged")
    with pytest.raises(ModelError, match="model_checkpoint_path must be a weights file or"):
        merge_weights(other, tmp_path / "gone", tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="save_path must be a new or empty folder"):
        merge_weights(other, gates, tmp_path / "full")
    assert not (tmp_path / "merged").exists()
    assert json.loads((other / "config.json").read_text())["model_type"] == "olmoe"
