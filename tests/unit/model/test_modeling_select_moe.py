"""A Select-MoE is an OLMoE to everything in transformers, with gates that learn and can be read."""

import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    OlmoeForCausalLM,
    OlmoeModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available

from selectmoe.model.modeling_select_moe import (
    QUALITY_LOSSES,
    SelectMoeForCausalLM,
    SelectMoeModel,
)
from selectmoe.model.quiet_loading import register_select_moe
from tests.tiny_select_moe import LOUD, blocks, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _registered_and_seeded():
    register_select_moe()
    torch.manual_seed(0)


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def assert_same_weights(model, other):
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert model.state_dict().keys() == theirs.keys()


def reloaded(model, folder, dtype):
    """In another dtype as users get it; `model.to(dtype)` would also round rotary frequencies."""
    model.save_pretrained(folder)
    return SelectMoeForCausalLM.from_pretrained(folder, dtype=dtype)


# Files and classes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_to_the_bit(tied, dtype, ids, tmp_path):
    model = tiny_model(trash_expert_mode="custom", tie_word_embeddings=tied)
    with torch.no_grad():
        for block in blocks(model):
            block.trash_expert.vector.normal_()
            block.quality_gate.bias.normal_()
    model = reloaded(model, tmp_path / "first", dtype)
    model.save_pretrained(tmp_path)
    loaded, report = SelectMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == dtype
    assert_same_weights(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_auto_classes_know_the_model_type(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(causal) is SelectMoeForCausalLM
    assert type(decoder) is SelectMoeModel
    assert_same_weights(causal, model)
    assert_same_weights(decoder, model.model)
    assert type(AutoModelForCausalLM.from_config(model.config)) is SelectMoeForCausalLM


def test_it_extends_transformers_own_classes():
    model = tiny_model()
    assert isinstance(model, OlmoeForCausalLM)
    assert isinstance(model.model, OlmoeModel)


def test_registering_twice_changes_nothing(tmp_path):
    register_select_moe()
    register_select_moe()
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is SelectMoeModel


def test_gates_start_as_configured():
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=512,
        quality_gate_init_mean=0.5,
        quality_gate_init_std=0.1,
        quality_gate_init_bias=3.0,
    )
    for block in blocks(SelectMoeModel(config)):
        weight = block.quality_gate.weight
        # 1,024 numbers: their mean is good to 0.1 / 32 and their deviation to 0.1 / 45; 4 times.
        assert weight.mean().item() == pytest.approx(0.5, abs=0.0125)
        assert weight.std().item() == pytest.approx(0.1, abs=0.009)
        assert block.quality_gate.bias.tolist() == [1.5, -1.5]


def test_a_fresh_models_gates_are_nearly_open(ids):
    good = tiny_model()(ids).router_logits[0]["quality_logits"].softmax(-1)[..., 0]
    # Normalized hidden states of 32 numbers times weights of 0.02: 0.16 around the bias of 4.
    assert (good - 1 / (1 + math.exp(-4))).abs().max() < 0.02


def test_flash_attention_that_is_not_installed_is_refused_by_name(tmp_path):
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2"):
        SelectMoeForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_experts_implementation_is_set_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = SelectMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="grouped_mm"):
        SelectMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="fastest")


# What it returns


def test_router_logits_are_one_dict_a_layer(ids):
    output = tiny_model()(ids)
    assert output.loss is None
    assert len(output.router_logits) == 2
    for layer in output.router_logits:
        assert layer.keys() == {"quality_logits", "moe_logits"}
        assert layer["quality_logits"].shape == (2, 7, 2)
        assert layer["moe_logits"].shape == (14, 4)
    assert tiny_model()(ids, output_router_logits=False).router_logits is None


def test_hidden_states_and_attentions_come_when_asked_for(ids):
    model = tiny_model(attn_implementation="eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, 7, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(2, 4, 7, 7)] * 2
    assert len(output.router_logits) == 2


def test_embeddings_may_come_in_the_place_of_ids(ids):
    model = tiny_model()
    output = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(output.logits, model(ids).logits)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("weight", [0.25, 0])
def test_loss_is_the_weighted_sum_of_its_parts(balanced, weight, ids):
    model = tiny_model(
        quality_loss_type="linear",
        quality_loss_weight=weight,
        enable_load_balancing=balanced,
        router_aux_loss_coef=0.5,
    )
    output = model(ids, labels=ids)
    expected = output.lm_loss
    assert (output.aux_loss is not None) == balanced
    assert (output.quality_loss is not None) == bool(weight)
    if balanced:
        base = OlmoeForCausalLM.forward(model, ids, labels=ids)
        torch.testing.assert_close(output.aux_loss, base.aux_loss)
        expected = expected + 0.5 * output.aux_loss
    if weight:
        logits = torch.stack([layer["quality_logits"] for layer in output.router_logits])
        torch.testing.assert_close(output.quality_loss, logits.softmax(-1)[..., 0].mean())
        expected = expected + weight * output.quality_loss
    torch.testing.assert_close(output.loss, expected)


def test_loss_comes_without_the_gates_logits_being_asked_for(ids):
    output = tiny_model()(ids, labels=ids, output_router_logits=False)
    assert output.router_logits is None
    assert output.quality_loss > 0


def test_a_tuple_where_transformers_is_told_to_return_one(ids):
    model = tiny_model()
    expected = model(ids, labels=ids)
    by_argument = model(ids, labels=ids, return_dict=False)
    model.config.return_dict = False
    for values in (by_argument, model(ids, labels=ids)):
        assert isinstance(values, tuple)
        assert torch.equal(values[0], expected.loss)
        assert torch.equal(values[1], expected.logits)


def test_only_the_last_logits_where_only_they_are_asked_for(ids):
    model = tiny_model()
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_a_loss_nobody_registered_is_refused_with_the_known_ones(ids):
    model = tiny_model(quality_loss_type="surprise")
    with pytest.raises(ValueError, match=r"one of beta_moment_matching, .*got 'surprise'"):
        model(ids, labels=ids)


def test_a_loss_of_ones_own_is_used_with_its_parameters(ids, monkeypatch):
    def furthest(good_LBT, mask_BT, *, sample_wise_averaging, target):
        assert not sample_wise_averaging
        return (good_LBT - target).abs().max()

    monkeypatch.setitem(QUALITY_LOSSES, "furthest", furthest)
    model = tiny_model(
        quality_loss_type="furthest",
        quality_loss_parameters={"target": 7.0},
        sample_wise_averaging=False,
    )
    assert 6 < model(ids, labels=ids).quality_loss < 7


# Training


@pytest.mark.parametrize("loss", ["sigmoid", "beta_moment_matching"])
def test_gradients_reach_every_gate(loss, ids):
    model = tiny_model(quality_loss_type=loss)
    model(ids, labels=ids).quality_loss.backward()
    for block in blocks(model):
        assert block.quality_gate.weight.grad.abs().max() > 0
        assert block.quality_gate.bias.grad.abs().max() > 0


@pytest.mark.parametrize("part", ["lm_loss", "quality_loss"])
def test_an_open_gate_in_bfloat16_still_has_the_gradient_of_float32(part, ids, tmp_path):
    # 0.99966 rounds to 1 in bfloat16, where a softmax's gradient good * (1 - good) would be 0.
    model = tiny_model(**{**LOUD, "quality_gate_init_std": 0.0, "quality_gate_init_bias": 8.0})
    half = reloaded(model, tmp_path, torch.bfloat16)
    for each in (model, half):
        each(ids, labels=ids)[part].backward()
    for block, half_block in zip(blocks(model), blocks(half), strict=True):
        expected = block.quality_gate.bias.grad
        assert expected.abs().min() > 0
        # To 8 bits, 14 tokens that partly cancel are off by some 10 %; a lost gradient is by 100 %.
        torch.testing.assert_close(
            half_block.quality_gate.bias.grad.float(), expected, rtol=0.3, atol=0
        )


def test_detached_gates_learn_from_their_logits_alone(ids):
    model = tiny_model().model
    model.detach_gates()
    output = model(ids, output_quality_logits=True)
    output.last_hidden_state.square().sum().backward(retain_graph=True)
    assert all(block.quality_gate.weight.grad is None for block in blocks(model))
    output["quality_logits"][1].sum().backward()
    assert blocks(model)[1].quality_gate.weight.grad.abs().max() > 0
    assert blocks(model)[0].quality_gate.weight.grad is None


def test_detaching_gates_changes_no_number(ids):
    model = tiny_model(trash_expert_mode="custom").model
    expected = model(ids).last_hidden_state
    model.detach_gates()
    assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_peft_trains_attention_by_lora_and_the_gates_whole(ids, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["quality_gate"],
        task_type="CAUSAL_LM",
    )
    base = SelectMoeForCausalLM.from_pretrained(tmp_path / "base")
    unchanged = base(ids)  # also: recorders that are in place before peft wraps the gates
    model = peft.get_peft_model(base, settings)
    output = model(input_ids=ids, labels=ids)
    assert len(output.router_logits) == 2
    output.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B", "modules_to_save"}
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad.abs().max() > 0 for name, p in trained.items() if "quality_gate" in name)
    torch.optim.SGD(trained.values(), lr=1.0).step()
    model.save_pretrained(tmp_path / "adapter")

    reloaded = peft.PeftModel.from_pretrained(
        SelectMoeForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        expected, actual = model.eval()(input_ids=ids), reloaded(input_ids=ids)
    for ours, theirs, before in zip(
        expected.router_logits, actual.router_logits, unchanged.router_logits, strict=True
    ):
        assert torch.equal(ours["quality_logits"], theirs["quality_logits"])
        assert not torch.equal(ours["quality_logits"], before["quality_logits"])
    assert torch.equal(actual.logits, expected.logits)


def _trainer(model, rows, folder, **arguments):
    pytest.importorskip("accelerate")
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,  # no clipping: steps are compared
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=rows,
    )


def _rows():
    ids = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainers_accumulated_step_is_the_step_of_one_large_batch(tmp_path):
    settings = {"quality_loss_type": "linear", "quality_loss_weight": 1.0}
    whole, accumulated, start = (tiny_model(**settings) for _ in range(3))
    _trainer(whole, _rows(), tmp_path, per_device_train_batch_size=4).train()
    _trainer(
        accumulated,
        _rows(),
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    ).train()
    initial, expected = start.state_dict(), whole.state_dict()
    for name, tensor in accumulated.state_dict().items():
        # One step moves a gate by some 0.1; a loss counted once a batch would move it 4 times as
        # far. The rest is the order in which float32 sums.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
        if "quality_gate" in name:
            assert (tensor - initial[name]).abs().max() > 1e-3


def test_parts_of_accumulated_batches_add_up_to_the_steps_loss():
    model = tiny_model(quality_loss_type="linear", enable_load_balancing=True)
    ids = torch.stack([row["input_ids"] for row in _rows()])
    labels = ids.clone()
    labels[0, :5] = -100
    first, second = (
        model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=28) for i in (0, 2)
    )
    alone = model(ids[:2], labels=labels[:2])
    # 12 of the step's 28 predicted tokens are in the first batch: 8 + 8 - 4.
    for part in ("lm_loss", "aux_loss", "quality_loss", "loss"):
        torch.testing.assert_close(first[part], alone[part] * 12 / 28)
    assert second.quality_loss > first.quality_loss


def test_trainers_predictions_are_the_logits(tmp_path):
    trainer = _trainer(tiny_model(), _rows(), tmp_path)
    predictions = trainer.predict(_rows()).predictions
    assert predictions.shape == (4, 9, 64)
