"""Gates on any base: they only read, and nothing above the last one is computed."""

import json

import pytest
import torch

from selectmoe.errors import ModelError
from selectmoe.model.attached_gates import attach_gates, load_gates, save_gates
from selectmoe.model.base_weights import hash_base
from selectmoe.model.decoder_layers import decoder_layers
from tests.made_gates import gates_for, save_selector
from tests.tiny_bases import FAMILIES, save_tiny_base, tiny_base

TOLERANCE = 1e-5  # float32; looser would hide a mask that leaks
LENGTHS = (23, 9, 4, 1)  # longer than the window of the family with a sliding one


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 300, (length,), generator=generator) for length in LENGTHS]


def padded(rows, *, padding=0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_base(request.param)


@torch.inference_mode()
def test_a_base_with_gates_has_the_logits_of_the_base_to_the_bit(model, rows):
    before = model(input_ids=padded(rows)).logits
    attached = attach_gates(model, gates_for(model))
    with attached.reading() as margins:
        after = model(input_ids=padded(rows)).logits
    assert sorted(margins) == [0, 1]
    assert margins[0].shape == padded(rows).shape
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    attached.detach()
    with attached.reading() as margins:
        model(input_ids=padded(rows))
    assert margins == {}


@torch.inference_mode()
def test_a_gate_reads_the_input_of_its_layers_feed_forward_module(model, rows):
    gates = gates_for(model, layers=(3,))
    inputs = []
    module = decoder_layers(model).feed_forward(3)
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    found = attach_gates(model, gates).margins(rows[0][None])
    logits = inputs[0] @ gates.weights_L2H[0].T + gates.biases_L2[0]
    torch.testing.assert_close(found[0], logits[..., 0] - logits[..., 1], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_a_cut_base_gives_the_same_margins_and_computes_nothing_above_the_last_gate(model, rows):
    attached = attach_gates(model, gates_for(model))
    whole = attached.margins(padded(rows))
    above, last = model.model.layers[3], model.model.layers[2].mlp
    norm = model.model.norm
    attached.cut()
    for module in (above, last, norm, model.lm_head):
        module.register_forward_pre_hook(lambda *_: pytest.fail("computed for nothing"))
    torch.testing.assert_close(attached.margins(padded(rows)), whole, rtol=0, atol=0)
    assert len(model.model.layers) == 3


@torch.inference_mode()
def test_margins_of_a_row_do_not_depend_on_its_batch_or_its_padding(model, rows):
    attached = attach_gates(model, gates_for(model))
    attached.cut()
    assert not attached.needs_mask
    for padding in (0, 7):
        together = attached.margins(padded(rows, padding=padding))
        for index, row in enumerate(rows):
            alone = attached.margins(row[None])[:, 0]
            found = together[:, index, : len(row)]
            torch.testing.assert_close(found, alone, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_a_base_that_attends_to_later_tokens_needs_the_mask(rows):
    model = tiny_base()
    attached = attach_gates(model, gates_for(model))
    model.model.layers[1].self_attn.is_causal = False
    assert attached.needs_mask


def test_a_base_is_frozen_in_its_dtype_and_gates_stay_float32(rows):
    model = tiny_base().to(torch.bfloat16)
    attached = attach_gates(model, gates_for(model))
    assert attached.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert attached.margins(rows[0][None]).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5 of tiny, and 4 of this LlamaForC"),
        ({"hidden_size": 48}, "hidden_size is 48 of tiny, and 32 of this LlamaForCausalLM"),
    ],
)
def test_gates_of_another_shape_are_refused_with_both_values(settings, message):
    model = tiny_base()
    with pytest.raises(ModelError, match=message):
        attach_gates(model, gates_for(model, **settings))


def test_saved_gates_are_loaded_as_they_were(tmp_path):
    gates = gates_for(tiny_base(), layers=(0, 3), revision="main", other_base_sha256={"f": "bf16"})
    assert save_gates(tmp_path / "s", gates) == tmp_path / "s" / "gates.safetensors"
    loaded = load_gates(tmp_path / "s")
    torch.testing.assert_close(loaded.weights_L2H, gates.weights_L2H, rtol=0, atol=0)
    torch.testing.assert_close(loaded.biases_L2, gates.biases_L2, rtol=0, atol=0)
    assert (loaded.config.layers, loaded.config.base_name) == ((0, 3), "tiny@main")
    assert loaded.config.accepts("f")
    assert not loaded.config.accepts("e")
    before = (tmp_path / "s" / "gates.safetensors").read_bytes()
    save_gates(tmp_path / "again", loaded)
    assert (tmp_path / "again" / "gates.safetensors").read_bytes() == before


def test_the_card_of_gates_says_what_they_read(tmp_path):
    base = "owner/tiny"
    others = {"e" * 64: "in bfloat16"}
    save_gates(tmp_path, gates_for(tiny_base(), base=base, other_base_sha256=others))
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: selectmoe\n")
    assert "base_model: owner/tiny\n" in card
    assert "1, 2 of 0 to 3; nothing above layer 2 is computed" in card
    assert f"`{'e' * 64}`: in bfloat16" in card
    save_gates(tmp_path, gates_for(tiny_base(), base="/home/me/tiny"))
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "# Quality gates for tiny\n" in card
    assert "/home" not in card


def test_gates_of_another_run_than_their_configuration_are_refused(tmp_path):
    save_gates(tmp_path / "a", gates_for(tiny_base()))
    save_gates(tmp_path / "b", gates_for(tiny_base(), layers=(0, 1)))
    (tmp_path / "a" / "gates.safetensors").rename(tmp_path / "b" / "gates.safetensors")
    with pytest.raises(ModelError, match=r"not the gates of gates_config.json: its SHA-256 is"):
        load_gates(tmp_path / "b")
    with pytest.raises(ModelError, match=r"not a selector folder: it has no gates.safetensors"):
        load_gates(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [2, 1]}, "'layers' must be layers from 0 to 3, ascending, at least one, got"),
        ({"layers": [4]}, r"'layers' must be layers from 0 to 3, .* got \[4\]"),
        ({"layers": []}, "'layers' must be"),
        ({"hidden_size": "32"}, "'hidden_size' must be an integer, at least 1, got '32'"),
        ({"base": ""}, "'base' must be text, got ''"),
        ({"colour": 1}, "has the unknown key 'colour'"),
        ({"base_sha256": None}, "'base_sha256' must be text, got None"),
    ],
)
def test_a_wrong_configuration_is_refused_with_file_key_rule_and_value(tmp_path, change, message):
    save_gates(tmp_path, gates_for(tiny_base()))
    file = tmp_path / "gates_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=rf"gates_config.json: {message}"):
        load_gates(tmp_path)


def test_a_configuration_without_a_key_is_refused(tmp_path):
    save_gates(tmp_path, gates_for(tiny_base()))
    file = tmp_path / "gates_config.json"
    content = json.loads(file.read_text())
    del content["base"]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="lacks the key 'base'"):
        load_gates(tmp_path)


def test_the_hash_of_a_base_does_not_depend_on_its_files_or_its_head(tmp_path):
    whole = save_tiny_base(tmp_path / "whole")
    model = tiny_base()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert hash_base(tmp_path / "shards") == hash_base(whole)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "head")
    assert hash_base(tmp_path / "head") == hash_base(whole)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert hash_base(tmp_path / "other") != hash_base(whole)


def test_a_saved_selector_fits_its_base(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    config = load_gates(save_selector(tmp_path / "selector", base)).config
    config.require_weights(hash_base(base), str(base), tmp_path / "selector")
    with pytest.raises(ModelError, match=f"SHA-256 of the weights is {config.base_sha256} of"):
        config.require_weights("f" * 64, "other", tmp_path / "selector")
