"""Weights that are missing, cut off or of another model are found before a run reads its corpus."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe.errors import ModelError, NotEnoughMemoryError
from selectmoe.model.free_memory import require_weights_fit
from selectmoe.model.weight_checks import count_parameters, require_weights
from selectmoe.model.weight_headers import read_header
from selectmoe.paths import EMBEDDED_SELECTOR

WEIGHTS = EMBEDDED_SELECTOR / "model.safetensors"


@pytest.fixture
def selector(tmp_path):
    return shutil.copytree(EMBEDDED_SELECTOR, tmp_path / "selector")


@pytest.fixture
def gates(tmp_path):
    """Stage 1's weights of the embedded selector: its own gates."""
    parts = {n: t for n, t in load_file(WEIGHTS).items() if "quality_gate" in n}
    file = tmp_path / "warm" / "full_rank_weights.safetensors"
    file.parent.mkdir()
    save_file({name.removeprefix("model."): tensor for name, tensor in parts.items()}, file)
    return file


def test_a_header_tells_the_shapes_that_torch_reads():
    shapes = read_header(WEIGHTS).shapes
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load_file(WEIGHTS).items()}
    num_parameters = sum(tensor.numel() for tensor in load_file(WEIGHTS).values())
    assert count_parameters(str(EMBEDDED_SELECTOR), with_head=True) == num_parameters


def test_weights_that_are_whole_are_accepted(selector, gates):
    require_weights(str(selector), gates)
    require_weights(str(selector), gates.parent)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no header; is it whole?"),
        (WEIGHTS.read_bytes()[:5_000], "it has no header; is it whole?"),
        (WEIGHTS.read_bytes()[:-1], "not whole: it has "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "run 'git lfs pull'"),
        (b"\x05\0\0\0\0\0\0\0oops!", "not a readable weights file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name_and_reason(selector, gates, content, reason):
    for file in (selector / "model.safetensors", gates):
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ModelError) as refused:
            require_weights(str(selector), gates)
        assert str(refused.value).startswith(f"{file}: ")
        assert reason in str(refused.value)
        file.write_bytes(whole)


def test_a_shard_that_the_index_names_must_be_there(selector):
    (selector / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        require_weights(str(selector))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (selector / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model-00001.*, which is missing"):
        require_weights(str(selector))


def test_gates_of_another_model_are_refused(selector, gates):
    tensors = load_file(gates)
    dropped = "layers.1.mlp.quality_gate.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, gates)
    with pytest.raises(ModelError, match=f"{gates}: lacks '{dropped}', a quality gate of"):
        require_weights(str(selector), gates)
    save_file({**tensors, "layers.0.mlp.quality_gate.weight": torch.zeros(2, 64)}, gates)
    with pytest.raises(ModelError, match=r"must have the shape \(2, 128\) of .* got \(2, 64\)"):
        require_weights(str(selector), gates)


def test_weights_that_do_not_fit_into_memory_are_refused_with_both_numbers():
    require_weights_fit(10**9, "bfloat16", purpose="scoring", free=2 * 10**9, kind="memory")
    with pytest.raises(NotEnoughMemoryError) as refused:
        require_weights_fit(10**9, "float32", purpose="scoring", free=2 * 10**9, kind="memory")
    assert str(refused.value) == (
        "scoring needs at least 4.0 GB of memory for 1.00 billion parameters in float32, and has "
        "2.0 GB; use a smaller model or a larger machine"
    )
