"""SelectMoeConfig travels through files unchanged and refuses what it cannot mean."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, OlmoeConfig

from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.quiet_loading import register_select_moe
from tests.tiny_select_moe import tiny_model

EVERY_SETTING_CHANGED = {
    "quality_gate_init_mean": 0.5,
    "quality_gate_init_std": 0.1,
    "quality_gate_init_bias": 1.0,
    "quality_gate_forced_open": True,
    "quality_loss_type": "mse",
    "quality_loss_weight": 0.25,
    "quality_loss_parameters": {"target": 0.75},
    "sample_wise_averaging": False,
    "trash_expert_mode": "custom",
    "trash_expert_name": "mine",
    "trash_noise_seed": 7,
    "trash_noise_at_evaluation": True,
    "enable_load_balancing": True,
    "output_router_logits": False,
}


def test_every_setting_survives_a_dictionary_and_a_file(tmp_path):
    register_select_moe()
    config = SelectMoeConfig(num_hidden_layers=3, **EVERY_SETTING_CHANGED)
    assert SelectMoeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SelectMoeConfig
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "select_moe"
    assert {name: getattr(loaded, name) for name in EVERY_SETTING_CHANGED} == EVERY_SETTING_CHANGED
    assert loaded.num_hidden_layers == 3


def test_the_list_above_is_complete():
    assert set(SelectMoeConfig().to_dict()) - set(OlmoeConfig().to_dict()) <= set(
        EVERY_SETTING_CHANGED
    )
    unchanged = SelectMoeConfig()
    assert not [n for n, v in EVERY_SETTING_CHANGED.items() if getattr(unchanged, n) == v]


def test_whole_numbers_are_numbers_too():
    # YAML and the command line read `quality_loss_weight=0` as an int.
    config = SelectMoeConfig(
        quality_gate_init_mean=1,
        quality_gate_init_std=0,
        quality_gate_init_bias=2,
        quality_loss_weight=0,
        quality_loss_parameters={"alpha": 2, "beta": 0.5},
    )
    assert config.quality_loss_parameters == {"alpha": 2, "beta": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trash_expert_mode": "none"}, "must be one of zero, noise, custom, got 'none'"),
        ({"trash_expert_name": "mine"}, "needs trash_expert_mode='custom', got 'mine' with 'zero'"),
        ({"quality_gate_init_std": -0.1}, "quality_gate_init_std must be .* got -0.1"),
        ({"quality_gate_init_std": float("inf")}, "quality_gate_init_std must be .* got inf"),
        ({"quality_loss_weight": -1.0}, "quality_loss_weight must be .* not negative, got -1.0"),
        ({"quality_loss_weight": float("nan")}, "quality_loss_weight must be finite .* got nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_rule_and_value(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectMoeConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quality_loss_weight", "0.1"),
        ("quality_loss_type", 3),
        ("quality_loss_parameters", {"alpha": "high"}),
        ("quality_gate_forced_open", "yes"),
        ("trash_noise_seed", 1.5),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{name}'"):
        SelectMoeConfig(**{name: value})


def test_a_model_is_built_from_any_name_of_a_loss():
    # Losses are registered by name, perhaps after the model was built: only using one looks it up.
    model = tiny_model(quality_loss_type="registered_later")
    assert model.config.quality_loss_type == "registered_later"
