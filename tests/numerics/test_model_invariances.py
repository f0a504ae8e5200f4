"""A gated model's numbers do not depend on how they are computed: padding, cache, kernels, memory.

Each tolerance is a few roundings of float32 (6e-8 of a value) in numbers of about 1: kernels sum in
another order. What is not computed in another order must be equal to the bit.
"""

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from selectmoe.model.quality_losses import QUALITY_LOSSES
from selectmoe.model.quiet_loading import register_select_moe
from tests.tiny_select_moe import LOUD, SMALL, tiny_model

ROUNDING = 1e-5
PAD = SMALL["pad_token_id"]


@pytest.fixture(autouse=True)
def _registered_and_seeded():
    register_select_moe()
    torch.manual_seed(0)


def token_ids(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def padded(rows, *, side):
    """Ids, mask and the positions that transformers' generate() derives from the mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = row, 1
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def quality_logits(output):
    return torch.stack([layer["quality_logits"] for layer in output.router_logits])


@torch.no_grad()
def gates_and_logits(model, **inputs):
    output = model(**inputs)
    return quality_logits(output), output.logits


def close(actual, expected, tolerance=ROUNDING):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_forced_open_the_model_is_its_base():
    model = tiny_model(**LOUD, quality_gate_forced_open=True, trash_expert_mode="custom")
    base = OlmoeForCausalLM(OlmoeConfig(**SMALL)).eval()
    report = base.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert all("quality_gate" in k or "trash_expert" in k for k in report.unexpected_keys)
    batch = padded(token_ids(7, 12), side="right")
    gates, logits = gates_and_logits(model, **batch)
    with torch.no_grad():
        assert torch.equal(logits, base(**batch).logits)
    assert gates.std() > 0.1  # the gates still say what they think
    model.force_gates_open(False)
    assert not torch.allclose(gates_and_logits(model, **batch)[1], logits, atol=0.01)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("trash", ["zero", "noise"])
def test_padding_on_either_side_equals_no_padding(side, attention, trash):
    model = tiny_model(**LOUD, trash_expert_mode=trash, trash_noise_at_evaluation=True)
    model.set_attn_implementation(attention)
    rows = token_ids(5, 11, 8)
    batch = padded(rows, side=side)
    gates, logits = gates_and_logits(model, **batch)
    for i, row in enumerate(rows):
        alone_gates, alone_logits = gates_and_logits(model, input_ids=row[None])
        real = batch["attention_mask"][i].bool()
        close(gates[:, i, real], alone_gates[:, 0])
        close(logits[i, real], alone_logits[0])


@pytest.mark.parametrize("loss", ["linear", "beta_moment_matching"])
def test_padding_does_not_count_in_any_loss(loss):
    model = tiny_model(**LOUD, quality_loss_type=loss, enable_load_balancing=True)
    rows = token_ids(5, 11)
    outputs = []
    for side in ("left", "right"):
        batch = padded(rows, side=side)
        # Not a row's first token: on the left a padding position would predict it.
        predicted = (batch["attention_mask"] == 1) & (batch["position_ids"] > 0)
        labels = batch["input_ids"].masked_fill(~predicted, -100)
        with torch.no_grad():
            outputs.append(model(**batch, labels=labels))
    for part in ("loss", "lm_loss", "aux_loss", "quality_loss"):
        close(outputs[0][part], outputs[1][part])
    good_by_row = [
        gates_and_logits(model, input_ids=row[None])[0].softmax(-1)[:, 0, :, 0] for row in rows
    ]
    good = torch.stack(
        [torch.nn.functional.pad(row, (0, 11 - row.shape[1])) for row in good_by_row]
    )
    mask = padded(rows, side="right")["attention_mask"]
    close(outputs[0].quality_loss, QUALITY_LOSSES[loss](good.transpose(0, 1), mask))


def test_two_documents_in_one_row_under_a_block_mask_equal_each_alone():
    model = tiny_model(**LOUD, quality_loss_type="linear")
    rows = token_ids(5, 8)
    document = torch.tensor([0] * 5 + [1] * 8)
    mask = (document[:, None] == document[None, :]).tril()[None, None]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "attention_mask": mask,
        "position_ids": torch.cat([torch.arange(5), torch.arange(8)])[None],
    }
    gates, logits = gates_and_logits(model, **packed)
    alone = [gates_and_logits(model, input_ids=row[None]) for row in rows]
    close(gates, torch.cat([each[0] for each in alone], dim=2))
    close(logits, torch.cat([each[1] for each in alone], dim=1))
    # Such a mask does not say what is padding, so every token counts.
    output = model(**packed, labels=packed["input_ids"])
    close(output.quality_loss.detach(), gates.softmax(-1)[..., 0].mean())


@pytest.mark.parametrize("trash", ["zero", "noise", "custom"])
def test_a_cache_changes_neither_logits_nor_gates(trash):
    model = tiny_model(**LOUD, trash_expert_mode=trash, trash_noise_at_evaluation=True)
    [row] = token_ids(12)
    gates, logits = gates_and_logits(model, input_ids=row[None])
    cache, by_step = None, []
    with torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 12)):
            output = model(input_ids=row[None, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            by_step.append((quality_logits(output), output.logits))
    close(torch.cat([step[0] for step in by_step], dim=2), gates)
    close(torch.cat([step[1] for step in by_step], dim=1), logits)


def test_losses_over_a_cached_prefix_count_the_new_tokens_alone():
    model = tiny_model(**LOUD, quality_loss_type="linear", enable_load_balancing=True)
    batch = padded(token_ids(6, 12), side="left")
    with torch.no_grad():
        whole = model(**batch)
        cache = model(
            input_ids=batch["input_ids"][:, :8],
            attention_mask=batch["attention_mask"][:, :8],
            position_ids=batch["position_ids"][:, :8],
        ).past_key_values
        rest = model(
            input_ids=batch["input_ids"][:, 8:],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"][:, 8:],
            past_key_values=cache,
            labels=batch["input_ids"][:, 8:],
        )
    close(rest.quality_loss, quality_logits(whole)[:, :, 8:].softmax(-1)[..., 0].mean())


def test_greedy_generation_equals_a_loop_without_cache_whatever_the_padding():
    model = tiny_model(**LOUD)
    rows = token_ids(4, 9)
    batch = padded(rows, side="left")
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )[:, 9:]
    for row, continuation in zip(rows, generated, strict=True):
        ids = row[None]
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
        assert torch.equal(ids[0, len(row) :], continuation)


def gradients(model, batch, labels):
    torch.manual_seed(5)  # the noise of a training step comes from the global generator
    model.train()
    model.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def _enable_checkpointing(model):
    # transformers 5.17 knows only the old name, of which later releases warn.
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("trash", ["zero", "noise", "custom"])
def test_gradient_checkpointing_changes_no_bit_of_loss_or_gradient(trash):
    model = tiny_model(**LOUD, trash_expert_mode=trash, quality_loss_type="mse", use_cache=False)
    batch = padded(token_ids(6, 12), side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss, expected = gradients(model, batch, labels)
    _enable_checkpointing(model)
    again, recomputed = gradients(model, batch, labels)
    assert torch.equal(again, loss)
    assert all(torch.equal(recomputed[name], expected[name]) for name in expected)
    assert all(g.abs().max() > 0 for n, g in expected.items() if "quality_gate" in n)


def test_eager_and_sdpa_attention_agree():
    batch = padded(token_ids(6, 12), side="left")
    real = batch["attention_mask"].bool()
    model = tiny_model(**LOUD)
    model.set_attn_implementation("eager")
    gates, logits = gates_and_logits(model, **batch)
    model.set_attn_implementation("sdpa")
    other_gates, other_logits = gates_and_logits(model, **batch)
    close(other_gates[:, real], gates[:, real])
    close(other_logits[real], logits[real])


def test_experts_in_a_loop_and_in_one_grouped_product_agree():
    batch = padded(token_ids(6, 12), side="right")
    labels = batch["input_ids"]
    found = {}
    for name in ("eager", "grouped_mm"):
        model = tiny_model(**LOUD, quality_loss_type="linear")
        model.set_experts_implementation(name)
        found[name] = (*gates_and_logits(model, **batch), *gradients(model, batch, labels))
    for one, other in zip(found["eager"][:3], found["grouped_mm"][:3], strict=True):
        close(one, other)
    for name, gradient in found["eager"][3].items():
        # A gradient sums over 24 tokens and the layers above: ten times the rounding of one value.
        close(found["grouped_mm"][3][name], gradient, 10 * ROUNDING)
