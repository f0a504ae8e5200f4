"""Where adapters go, by the names of each model."""

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Qwen3Config

from selectmoe.config.lora import LoraSettings
from selectmoe.errors import ConfigError
from selectmoe.training.lora_targets import find_targets, targeted
from tests.tiny_olmoe import save_tiny_olmoe
from tests.tiny_select_moe import tiny_model
from tests.tiny_target import save_tiny_llama

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture
def llama(tmp_path):
    return AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "llama"))


@pytest.fixture
def olmoe(tmp_path):
    return AutoModelForCausalLM.from_pretrained(save_tiny_olmoe(tmp_path / "olmoe"))


def find(model, *names, dropout=0.1):
    lora = LoraSettings(target_modules=names, lora_dropout=dropout)
    return find_targets(model, lora, model_name="the model")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            Qwen3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
                        num_attention_heads=2, num_key_value_heads=1, vocab_size=8, **SPECIAL),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
        # c_proj stands in the MLP, too.
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, **SPECIAL),
         {"c_attn", "attn.c_proj"}),
        (
            GPTNeoXConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=16, vocab_size=8, **SPECIAL),
            {"query_key_value", "dense"},
        ),
    ],
)  # fmt: skip
def test_attention_projections_are_found_by_the_models_own_names(config, expected):
    model = AutoModelForCausalLM.from_config(config)
    assert set(find(model).modules) == expected


def test_neither_gates_nor_experts_get_an_adapter_unasked(olmoe):
    for model in (olmoe, tiny_model()):
        targets = find(model)
        assert set(targets.modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert targets.parameters == ()
        assert len(list(targeted(model, targets))) == 4 * model.config.num_hidden_layers


def test_fused_experts_are_weights_and_take_no_dropout(olmoe):
    with pytest.raises(ConfigError, match=r"lora_dropout must be 0 .*gate_up_proj.* got 0\.1"):
        find(olmoe, "q_proj", "mlp.experts.gate_up_proj")
    targets = find(olmoe, "q_proj", "mlp.experts.gate_up_proj", dropout=0.0)
    assert (targets.modules, targets.parameters) == (("q_proj",), ("mlp.experts.gate_up_proj",))


def test_a_name_that_nothing_ends_with_is_refused_with_those_that_there_are(llama):
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj.*got 'query'"):
        find(llama, "q_proj", "query")
    with pytest.raises(ConfigError, match="got 'proj'"):
        find(llama, "proj")


def test_a_model_without_attention_projections_says_what_it_has(llama):
    for layer in llama.model.layers:
        del layer.self_attn
    with pytest.raises(ConfigError, match=r"no linear attention projections.*mlp\.gate_proj"):
        find(llama)
