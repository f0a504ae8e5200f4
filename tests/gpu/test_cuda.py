"""On a GPU a gated model computes what it computes on a CPU: float32, and bfloat16 to 8 bits."""

import copy

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import register_select_moe
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample
from selectmoe.scoring.engine import ScoringEngine
from tests.tiny_select_moe import LOUD, tiny_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Two layers of float32 in another order of summation, as between kernels of one device.
FLOAT32 = 1e-4
# bfloat16 has 8 bits of mantissa: 0.4 % of numbers up to 3, a few times over.
BFLOAT16 = 0.1


@pytest.fixture(autouse=True)
def _registered_and_seeded():
    register_select_moe()
    torch.manual_seed(0)


@pytest.fixture
def batch():
    """Two rows, the first padded on the left, with the positions that generate() would give."""
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def loud_model(**settings):
    return tiny_model(**LOUD, **settings)


@pytest.fixture
def in_bfloat16(tmp_path):
    """A copy on the GPU as users get it; `model.to(dtype)` would also round rotary frequencies."""

    def convert(model):
        model.save_pretrained(tmp_path)
        half = SelectMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        return half.to(DEVICE)

    return convert


@torch.no_grad()
def gates_and_logits(model, batch):
    """float32, on the CPU, of real tokens only."""
    output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    gates = torch.stack([layer["quality_logits"] for layer in output.router_logits])
    real = batch["attention_mask"].bool()
    return gates.float().cpu()[:, real], output.logits.float().cpu()[real]


def assert_agree(model, other, batch, tolerance):
    for actual, expected in zip(
        gates_and_logits(other, batch), gates_and_logits(model, batch), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("trash", ["zero", "noise", "custom"])
def test_float32_equals_the_cpu(attention, trash, batch):
    model = loud_model(trash_expert_mode=trash, trash_noise_at_evaluation=True)
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager")
    assert_agree(model, copy.deepcopy(model).to(DEVICE), batch, FLOAT32)


def test_bfloat16_gates_equal_float32_gates_to_8_bits(batch, in_bfloat16):
    # One layer: a rounding that flips a router's choice would change all that follows.
    model = loud_model(num_hidden_layers=1)
    half = in_bfloat16(model)
    expected, _ = gates_and_logits(model, batch)
    actual, _ = gates_and_logits(half, batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=BFLOAT16)


def test_grouped_experts_equal_a_loop_over_experts_in_bfloat16(batch, in_bfloat16):
    model = in_bfloat16(loud_model(num_hidden_layers=1))
    model.set_experts_implementation("eager")
    grouped = copy.deepcopy(model)
    grouped.set_experts_implementation("grouped_mm")
    assert_agree(model, grouped, batch, BFLOAT16)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_equals_sdpa_under_left_padding(batch, in_bfloat16):
    model = in_bfloat16(loud_model(num_hidden_layers=1))
    flash = copy.deepcopy(model)
    flash.set_attn_implementation("flash_attention_2")
    assert_agree(model, flash, batch, BFLOAT16)


@pytest.mark.parametrize("trash", ["zero", "noise"])
def test_a_row_does_not_depend_on_batch_mates(trash, batch):
    model = loud_model(trash_expert_mode=trash, trash_noise_at_evaluation=True).to(DEVICE)
    together, _ = gates_and_logits(model, batch)
    for i, chosen in ((0, slice(0, 10)), (1, slice(10, 26))):
        real = batch["attention_mask"][i].bool()
        row = {name: tensor[i : i + 1, real] for name, tensor in batch.items()}
        alone, _ = gates_and_logits(model, row)
        torch.testing.assert_close(together[:, chosen], alone, rtol=0, atol=FLOAT32)


def step_gradients(model, ids):
    torch.manual_seed(5)  # the noise of a training step comes from the global generator
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trash", ["zero", "noise"])
def test_gradient_checkpointing_recomputes_the_same_step(trash, batch):
    model = loud_model(trash_expert_mode=trash, use_cache=False).to(DEVICE)
    ids = batch["input_ids"].to(DEVICE)
    expected = step_gradients(model, ids)
    # transformers 5.17 knows only the old name, of which later releases warn.
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)()
    recomputed = step_gradients(model, ids)
    for name, gradient in expected.items():
        # Not to the bit: CUDA's scatter-adds sum in no fixed order.
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=FLOAT32)


def test_gates_learn_in_bfloat16(batch, in_bfloat16):
    model = in_bfloat16(loud_model(quality_loss_type="linear"))
    gradients = step_gradients(model, batch["input_ids"].to(DEVICE))
    gates = [gradient for name, gradient in gradients.items() if "quality_gate" in name]
    assert len(gates) == 4
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gates)


def test_greedy_generation_equals_the_cpu(batch):
    model = loud_model()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.to(DEVICE)
    actual = model.generate(
        **{name: tensor.to(DEVICE) for name, tensor in inputs.items()},
        max_new_tokens=8,
        do_sample=False,
    )
    assert torch.equal(actual.cpu(), expected)


def test_the_embedded_selectors_scores_equal_the_cpus():
    samples = [
        Sample("d", str(i), (Message("user", "Why? " * i), Message("assistant", "So. " * (2 * i))))
        for i in range(1, 9)
    ]
    scores = {
        device: [
            row.score
            for row in ScoringEngine.from_pretrained(
                EMBEDDED_SELECTOR, device=device, dtype="float32", experts_implementation="eager"
            ).score(samples)
        ]
        for device in ("cpu", DEVICE)
    }
    assert scores[DEVICE] == pytest.approx(scores["cpu"], abs=FLOAT32)
