"""Trash experts: what a layer returns in the place of its experts where a gate is shut."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from selectmoe.model.modeling_select_moe import (
    NoiseTrashExpert,
    SelectMoeForCausalLM,
    register_trash_expert,
)
from selectmoe.model.quiet_loading import register_select_moe
from tests.tiny_select_moe import blocks, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _registered_and_seeded():
    register_select_moe()
    torch.manual_seed(0)


@pytest.fixture
def ids():
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def closed(**settings):
    """A model whose gates are shut, so that trash experts are all that its layers return."""
    return tiny_model(quality_gate_init_bias=-200.0, quality_gate_init_std=0.0, **settings)


def test_zero_trash_adds_nothing_to_the_residual(ids):
    model = closed()
    returned = [block(torch.ones(1, 3, 32)) for block in blocks(model)]
    assert all(torch.equal(output, torch.zeros(1, 3, 32)) for output in returned)


def test_output_is_experts_and_trash_in_the_proportion_of_the_gate():
    [block, _] = blocks(tiny_model(trash_expert_mode="custom", quality_gate_init_std=1.0))
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        block.trash_expert.vector.normal_()
        good = block.quality_gate(hidden).softmax(-1)[..., :1]
        block.forced_open = True
        experts = block(hidden)
        block.forced_open = False
        expected = good * experts + (1 - good) * block.trash_expert.vector
        torch.testing.assert_close(block(hidden), expected)


def test_noise_has_each_tokens_own_mean_and_deviation():
    config = tiny_config(hidden_size=4_096, trash_noise_at_evaluation=True)
    expert = NoiseTrashExpert(config, layer_idx=0)
    hidden = torch.randn(2, 3, 4_096) * torch.tensor([0.1, 1.0, 10.0])[:, None] + 5
    for noise in (expert.train()(hidden), expert.eval()(hidden)):
        mean, deviation = hidden.mean(-1), hidden.std(-1)
        # 4,096 draws: the mean is good to 1/64 of the deviation, the deviation to 1/90; 4 times.
        assert ((noise.mean(-1) - mean).abs() < deviation / 16).all()
        assert ((noise.std(-1) / deviation - 1).abs() < 0.045).all()
        assert not torch.allclose(noise, hidden, atol=0.01)


def test_noise_is_off_at_evaluation_unless_asked_for():
    hidden = torch.randn(2, 3, 32)
    for asked in (False, True):
        config = tiny_config(trash_noise_at_evaluation=asked)
        noise = NoiseTrashExpert(config, layer_idx=0).eval()(hidden)
        assert bool(noise.abs().max() > 0) is asked


def test_noise_at_evaluation_is_the_seeds_and_the_tokens_alone():
    config = tiny_config(trash_noise_at_evaluation=True, trash_noise_seed=3)
    other_seed = tiny_config(trash_noise_at_evaluation=True, trash_noise_seed=4)
    hidden = torch.randn(3, 5, 32)
    noise = NoiseTrashExpert(config, layer_idx=0).eval()(hidden)
    again = NoiseTrashExpert(config, layer_idx=0).eval()
    # Equal but for the rounding of a mean over 32 numbers in another order.
    torch.testing.assert_close(again(hidden[1:2, 2:]), noise[1:2, 2:])
    torch.testing.assert_close(again(hidden.flip(0)).flip(0), noise)
    for changed, layer in ((other_seed, 0), (config, 1)):
        other = NoiseTrashExpert(changed, layer_idx=layer).eval()(hidden)
        assert (other - noise).abs().max() > 0.1


def test_training_noise_is_fresh_each_step_and_repeats_with_the_global_seed(ids):
    model = closed(trash_expert_mode="noise").train()
    torch.manual_seed(11)
    first, second = model(ids).logits, model(ids).logits
    torch.manual_seed(11)
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(second, first, atol=1e-3)


def test_training_noise_differs_between_tokens_and_layers():
    hidden = torch.ones(1, 2, 32) + torch.arange(32)
    experts = [block.trash_expert.train() for block in blocks(closed(trash_expert_mode="noise"))]
    outputs = []
    for expert in experts:
        torch.manual_seed(0)
        outputs.append(expert(hidden))
    assert (outputs[0][0, 0] - outputs[0][0, 1]).abs().max() > 0.1
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_the_learned_vector_starts_at_zero_and_learns(ids):
    model = tiny_model(trash_expert_mode="custom", quality_gate_init_bias=0.0)
    model(ids, labels=ids).lm_loss.backward()
    for block in blocks(model):
        assert not block.trash_expert.vector.any()
        assert block.trash_expert.vector.grad.abs().max() > 0


class ScaledTrash(nn.Module):
    """A user's module with what transformers cannot initialise: a bare parameter and a buffer."""

    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), 3.0))
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.constant_(self.mix.weight, 0.5)
        self.register_buffer("shift", torch.ones(config.hidden_size), persistent=False)

    def forward(self, hidden):
        return self.mix(hidden) * self.scale + self.shift


@pytest.fixture
def scaled_trash():
    register_trash_expert("scaled", ScaledTrash)
    return {"trash_expert_mode": "custom", "trash_expert_name": "scaled"}


def assert_fresh(trash):
    assert (trash.scale == 3).all()
    assert (trash.mix.weight == 0.5).all()
    assert (trash.shift == 1).all()


def test_a_registered_module_starts_as_its_builder_makes_it(scaled_trash, tmp_path):
    for block in blocks(tiny_model(**scaled_trash)):
        assert_fresh(block.trash_expert)
    tiny_model().save_pretrained(tmp_path)
    # The checkpoint has no tensor for it, and loading makes tensors of bare memory.
    converted = SelectMoeForCausalLM.from_pretrained(tmp_path, **scaled_trash)
    for block in blocks(converted):
        assert_fresh(block.trash_expert)


def test_a_registered_module_is_used_learns_and_is_saved(scaled_trash, ids, tmp_path):
    model = tiny_model(quality_gate_init_bias=0.0, **scaled_trash)
    model(ids, labels=ids).lm_loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    trash = blocks(model)[0].trash_expert
    assert not (trash.scale == 3).any()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(blocks(loaded)[0].trash_expert, ScaledTrash)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tensors_that_a_checkpoint_lacks_start_fresh_and_the_others_stay(tmp_path):
    model = tiny_model(trash_expert_mode="custom", quality_gate_init_bias=3.0)
    with torch.no_grad():
        blocks(model)[0].trash_expert.vector.fill_(7)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lacking = ("layers.1.mlp.trash_expert.vector", "layers.1.mlp.quality_gate.bias")
    kept = {k: v for k, v in load_file(file).items() if not k.endswith(lacking)}
    save_file(kept, file, metadata={"format": "pt"})
    first, second = blocks(SelectMoeForCausalLM.from_pretrained(tmp_path))
    assert (first.trash_expert.vector == 7).all()
    assert torch.equal(second.quality_gate.weight, blocks(model)[1].quality_gate.weight)
    assert second.quality_gate.bias.tolist() == [1.5, -1.5]
    assert not second.trash_expert.vector.any()


def test_an_unregistered_module_is_refused_with_the_known_ones(scaled_trash):
    with pytest.raises(ValueError, match=r"'missing' is not registered; .*known: .*scaled"):
        tiny_model(trash_expert_mode="custom", trash_expert_name="missing")
