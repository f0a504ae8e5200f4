"""Stage 1's trained tensors travel in a small file of their own and are checked on arrival."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from selectmoe.config.warmup import TrainingConfig
from selectmoe.errors import ModelError
from selectmoe.model.file_modes import follow_umask
from selectmoe.model.gate_weights import (
    gate_weights,
    load_gate_weights,
    merge_adapter,
    save_gate_weights,
    write_gate_settings,
)
from selectmoe.model.modeling_select_moe import (
    _TRASH_EXPERTS,
    SelectMoeForCausalLM,
    SelectMoeModel,
    VectorTrashExpert,
    register_trash_expert,
)
from selectmoe.warmup.gate_model import with_adapter
from tests.tiny_select_moe import blocks, tiny_model

TRAINED = ("quality_gate.weight", "quality_gate.bias", "gate.weight", "trash_expert.vector")


def trained_model(kind=SelectMoeForCausalLM, *, seed=0, **settings):
    model = tiny_model(kind, seed=seed, trash_expert_mode="custom", **settings)
    with torch.no_grad():
        for block in blocks(model):
            block.trash_expert.vector.normal_()
    return model


def test_a_file_holds_gates_routers_and_trash_vectors_and_no_more(tmp_path):
    file = save_gate_weights(trained_model(), tmp_path / "new" / "folder")
    assert file.name == "full_rank_weights.safetensors"
    assert load_file(file).keys() == {
        f"layers.{layer}.mlp.{name}" for layer in (0, 1) for name in TRAINED
    }
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no .partial left


@pytest.mark.parametrize("source", [SelectMoeForCausalLM, SelectMoeModel])
@pytest.mark.parametrize("target", [SelectMoeForCausalLM, SelectMoeModel])
@pytest.mark.parametrize("as_folder", [True, False])
def test_weights_pass_between_both_classes_to_the_bit(source, target, as_folder, tmp_path):
    trained, fresh = trained_model(source, seed=1), trained_model(target, seed=2)
    expected = gate_weights(trained)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    file = save_gate_weights(trained, tmp_path)
    load_gate_weights(fresh, tmp_path if as_folder else file)
    moved = {n for n, tensor in fresh.state_dict().items() if not torch.equal(tensor, before[n])}
    assert {name.removeprefix("model.") for name in moved} == {
        name
        for name in expected
        if not name.endswith("quality_gate.bias")  # equal in all models
    }
    assert all(torch.equal(tensor, expected[n]) for n, tensor in gate_weights(fresh).items())


def test_float32_weights_enter_a_bfloat16_model(tmp_path):
    trained = trained_model(seed=1)
    half = trained_model(seed=2).to(torch.bfloat16)
    save_gate_weights(trained, tmp_path)
    load_gate_weights(half, tmp_path)
    for name, tensor in gate_weights(half).items():
        assert torch.equal(tensor, gate_weights(trained)[name].to(torch.bfloat16))


def test_a_pickle_of_tensors_is_read_whatever_its_prefix(tmp_path):
    trained, fresh = trained_model(seed=1), trained_model(seed=2)
    file = tmp_path / "full_rank_weights.pt"
    torch.save({f"model.{n}": t for n, t in gate_weights(trained).items()}, file)
    load_gate_weights(fresh, file)
    assert all(torch.equal(t, gate_weights(trained)[n]) for n, t in gate_weights(fresh).items())


def test_a_file_of_quality_gates_alone_leaves_routers_and_vectors(tmp_path):
    trained, fresh = trained_model(seed=1), trained_model(seed=2)
    before = {n: t.clone() for n, t in gate_weights(fresh).items()}
    only = {n: t for n, t in gate_weights(trained).items() if "quality_gate" in n}
    save_file(only, tmp_path / "gates.safetensors")
    load_gate_weights(fresh, tmp_path / "gates.safetensors")
    for name, tensor in gate_weights(fresh).items():
        assert torch.equal(tensor, only.get(name, before[name])), name


def hidden_states(model) -> torch.Tensor:
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    decoder = getattr(model, "model", model)
    with torch.no_grad():
        return decoder(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("target", [SelectMoeForCausalLM, SelectMoeModel])
def test_a_trash_expert_that_was_trained_is_loaded_into_a_model_without_one(target, tmp_path):
    trained, fresh = trained_model(target, seed=1), tiny_model(target, seed=1)
    assert not torch.equal(hidden_states(trained), hidden_states(fresh))
    load_gate_weights(fresh, save_gate_weights(trained, tmp_path))
    assert fresh.config.trash_expert_mode == "custom"
    assert torch.equal(hidden_states(trained), hidden_states(fresh))


def test_a_trash_expert_in_a_file_that_does_not_name_its_mode_is_recognized(tmp_path):
    trained, fresh = trained_model(seed=1), tiny_model(seed=1)
    save_file(gate_weights(trained), tmp_path / "full_rank_weights.safetensors")
    load_gate_weights(fresh, tmp_path)
    assert torch.equal(hidden_states(trained), hidden_states(fresh))


def test_a_trash_expert_that_nobody_registered_is_refused_by_name(tmp_path):
    register_trash_expert("lost", lambda config: nn.Linear(config.hidden_size, config.hidden_size))
    named = {"trash_expert_mode": "custom", "trash_expert_name": "lost"}
    file = save_gate_weights(tiny_model(**named), tmp_path)
    load_gate_weights(tiny_model(), file)
    del _TRASH_EXPERTS["lost"]
    with pytest.raises(ModelError, match=rf"{file}: trash_expert_name 'lost' is not registered"):
        load_gate_weights(tiny_model(), file)


def test_an_adapter_brings_its_trash_expert(tmp_path):
    trained = with_adapter(trained_model(seed=1), TrainingConfig(peft_mode="lora"), name="tiny")
    for module in trained.modules():
        if isinstance(module, VectorTrashExpert):
            module.vector.data.normal_()
    trained.save_pretrained(tmp_path)
    write_gate_settings(trained.get_base_model(), tmp_path)
    merged = merge_adapter(tiny_model(seed=1), tmp_path / "adapter_model.safetensors")
    expected = hidden_states(trained.get_base_model())
    torch.testing.assert_close(hidden_states(merged), expected, rtol=0, atol=1e-6)
    assert merged.config.trash_expert_mode == "custom"


@pytest.mark.parametrize("num_logits", [1, 2])
def test_weights_of_the_original_implementation_open_the_gates_as_it_does(num_logits, tmp_path):
    """Its gate is a layer of its own with one logit or two, and no bias; its tensors are nested."""
    random = torch.Generator().manual_seed(3)
    gates = [torch.randn(num_logits, 32, generator=random) for _ in range(2)]
    routers = [torch.randn(4, 32, generator=random) for _ in range(2)]
    weights = {f"model.layers.{n}.quality_gate.gate.weight": gate for n, gate in enumerate(gates)}
    weights |= {f"model.layers.{n}.normal_moe.gate.weight": t for n, t in enumerate(routers)}
    checkpoint = {
        "full_rank_weights": weights, "mode": "parameter", "tokenizer_saved": True,
        "target_patterns": ["quality_gate", ".gate.weight"],
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "full_rank_weights.pt")
    model = tiny_model()
    load_gate_weights(model, tmp_path)
    hidden = torch.randn(3, 32, generator=random)
    for block, gate, router in zip(blocks(model), gates, routers, strict=True):
        logits = hidden @ gate.T
        theirs = logits.sigmoid() if num_logits == 1 else logits.softmax(-1)
        ours = block.quality_gate(hidden).softmax(-1)
        torch.testing.assert_close(ours[:, 0], theirs[:, 0])
        assert torch.equal(block.gate.weight, router)


def test_files_of_stage_1_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        file = save_gate_weights(trained_model(), tmp_path / "gates")
        save_file(gate_weights(trained_model()), tmp_path / "adapter_model.safetensors")
        follow_umask(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (file, tmp_path / "adapter_model.safetensors")}
    assert modes == {0o640}


def write_nothing(folder):
    return folder / "absent.safetensors"


def write_text(folder):
    file = folder / "text.safetensors"
    file.write_text("not tensors")
    return file


def write_code(folder):
    file = folder / "code.pt"
    torch.save(nn.Linear(2, 2), file)  # a pickle that would run code of its class
    return file


def write_a_list(folder):
    file = folder / "list.pt"
    torch.save([torch.zeros(2)], file)
    return file


def write_nested(folder):
    file = folder / "nested.pt"
    torch.save({"state_dict": gate_weights(trained_model())}, file)
    return file


def write_without_a_gate(folder):
    file = folder / "lacking.safetensors"
    weights = gate_weights(trained_model())
    del weights["layers.1.mlp.quality_gate.bias"]
    save_file(weights, file)
    return file


def write_of_a_deeper_model(folder):
    file = folder / "deeper.safetensors"
    save_file(gate_weights(trained_model(num_hidden_layers=3)), file)
    return file


def write_of_a_wider_model(folder):
    file = folder / "wider.safetensors"
    save_file(gate_weights(trained_model(hidden_size=64)), file)
    return file


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, r"must be a weights file or a folder .* got .*absent"),
        (write_text, r"text\.safetensors: not a readable weights file"),
        (write_code, r"code\.pt: not a readable weights file"),
        (write_a_list, r"list\.pt: must hold a dictionary of tensors"),
        (write_nested, r"nested\.pt: must hold a dictionary of tensors"),
        (write_without_a_gate, r"lacks 'layers\.1\.mlp\.quality_gate\.bias' \(1 quality-gate"),
        (write_of_a_deeper_model, r"no tensor 'layers\.2\.mlp\.gate\.weight' \(4 such\)"),
        (write_of_a_wider_model, r"must have the shape \(4, 32\) of the model, got \(4, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(write, message, tmp_path):
    model = trained_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_gate_weights(model, write(tmp_path))
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("only_read", [True, False])
def test_gates_act_on_the_model_that_loads_them_as_they_did_in_their_warm_up(tmp_path, only_read):
    file = save_gate_weights(trained_model(quality_gate_forced_open=only_read), tmp_path)
    loaded = trained_model(quality_gate_forced_open=not only_read)
    load_gate_weights(loaded, file)
    assert loaded.config.quality_gate_forced_open is only_read
    assert [block.forced_open for block in blocks(loaded)] == [only_read, only_read]


def test_the_same_weights_are_the_same_bytes(tmp_path):
    files = [save_gate_weights(trained_model(), tmp_path / name) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
