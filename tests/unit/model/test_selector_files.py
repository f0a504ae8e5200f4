"""What --model and model_checkpoint_path name: a Select-MoE, a selector folder or a base."""

import json
import logging
import re
import shutil

import huggingface_hub.constants
import pytest

from selectmoe.errors import ModelError
from selectmoe.model import gguf_file, selector_files
from selectmoe.model.base_weights import hash_base
from selectmoe.model.checkpoint import hash_weights
from selectmoe.model.selector_files import GatedBaseFiles, SelectMoeFiles, find_selector
from selectmoe.paths import EMBEDDED_SELECTOR
from tests.hub_cache import add_to_hub_cache
from tests.made_gates import save_selector
from tests.tiny_bases import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture
def selector(base, tmp_path):
    return save_selector(tmp_path / "selector", base)


def change_config(selector, **changes):
    file = selector / "gates_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(model, checkpoint=None):
    with pytest.raises(ModelError) as caught:
        find_selector(str(model), checkpoint).require_readable()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_selector_is_a_select_moe_whose_hash_has_not_changed():
    files = find_selector(str(EMBEDDED_SELECTOR))
    assert isinstance(files, SelectMoeFiles)
    assert files.weights_hash() == hash_weights(str(EMBEDDED_SELECTOR), None)
    assert files.calibration_folder() == EMBEDDED_SELECTOR
    files.require_readable()


def test_a_selector_folder_names_its_base(base, selector):
    files = find_selector(str(selector))
    assert isinstance(files, GatedBaseFiles)
    assert (files.model, files.gates) == (str(base), selector)
    assert files.calibration_folder() == selector
    files.require_readable()


@pytest.mark.parametrize("name", ["", "gates.safetensors"])
def test_a_base_takes_gates_that_are_given(base, selector, name):
    given = find_selector(str(base), str(selector / name))
    assert given.weights_hash() == find_selector(str(selector)).weights_hash()
    given.require_readable()


def test_a_base_may_lie_beside_its_selector_folder(base, selector):
    change_config(selector, base="../base")
    shutil.copytree(base, selector.parent / "base")
    assert find_selector(str(selector)).model == str(selector.parent / "base")


def test_a_base_that_is_not_here_is_refused_with_the_settings_that_name_it(selector):
    change_config(selector, base="/nowhere/base")
    remedy = f"give it as model=BASE model_checkpoint_path={selector}"
    assert f"/nowhere/base is not on this machine; {remedy}" in refusal(selector)
    change_config(selector, base="nobody/nothing")
    assert f"give it as model=BASE model_checkpoint_path={selector}" in refusal(selector)


def test_the_hash_of_a_selector_is_that_of_base_and_gates(base, selector, tmp_path):
    first = find_selector(str(selector)).weights_hash()
    other_gates = save_selector(tmp_path / "gates", base, layers=(0, 1))
    assert find_selector(str(other_gates)).weights_hash() != first
    copy = shutil.copytree(base, tmp_path / "copy")
    assert find_selector(str(copy), selector).weights_hash() == first


def test_a_plain_base_is_refused_with_the_command_that_warms_gates_up(base, tmp_path):
    found = refusal(base)
    assert f"{base}: a base without quality gates (model_type 'llama')" in found
    assert f"'python jobs/pretrain.py --model {base}'" in found
    olmoe = save_tiny_base(tmp_path / "olmoe", "olmoe")
    assert f"'python jobs/convert.py --base {olmoe} --save-path DIR'" in refusal(olmoe)
    assert f"'python jobs/pretrain.py --model {olmoe}'" in refusal(olmoe)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"initializer_range": 0.1}, "the SHA-256 of the weights is {sha} of {base}, and"),
        ("llama", {"hidden_size": 64}, "hidden_size is 32 of {base}, and 64 of {other}"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers is 4 of {base}, and 3 of {other}"),
        ("qwen3", {}, "model_type is llama of {base}, and qwen3 of {other}"),
    ],
)
def test_gates_for_another_base_are_refused_with_both_values(
    base, selector, tmp_path, family, settings, message
):
    other = save_tiny_base(tmp_path / "other", family, **settings)
    expected = message.format(sha=hash_base(base), base=base, other=other)
    assert f"{selector}: gates for another base: {expected}" in refusal(other, selector)
    if "SHA" in message:
        assert f"and {hash_base(other)} of {other}" in refusal(other, selector)


def test_weights_that_are_no_gates_are_refused_for_a_base(base, tmp_path):
    message = refusal(base, tmp_path)
    assert f"must be a folder with gates_config.json for gates on {base}" in message


def test_a_selector_folder_takes_no_other_gates(selector):
    assert "has gates of its own; give model=BASE" in refusal(selector, selector)


def test_a_base_that_is_cut_off_is_refused(base, selector, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert re.search("model.safetensors: not whole", refusal(broken, selector))
    file.unlink()
    assert "has neither model.safetensors nor" in refusal(broken, selector)


@pytest.fixture
def shipped(base, tmp_path, monkeypatch):
    """Gates that ship for the base, named as on the hub."""
    folder = save_selector(tmp_path / "assets" / "tiny", base, base="tiny/Llama", revision="main")
    monkeypatch.setattr(selector_files, "SHIPPED_GATES", folder.parent)
    return folder


def test_shipped_gates_are_found_by_the_hash_of_a_folder(base, shipped, tmp_path):
    copy = shutil.copytree(base, tmp_path / "renamed")
    files = find_selector(str(copy))
    assert (files.model, files.gates) == (str(copy), shipped)
    files.require_readable()


def test_a_base_of_the_same_shape_is_told_which_weights_gates_ship_for(base, shipped, tmp_path):
    other = save_tiny_base(tmp_path / "other", initializer_range=0.1)
    message = refusal(other)
    assert (
        f"those for tiny/Llama were made on weights with the SHA-256 {hash_base(base)}" in message
    )
    assert f"these have {hash_base(other)}" in message


def test_shipped_gates_read_another_form_of_their_base_from_the_hub_and_say_so(
    base, shipped, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    other_form = save_tiny_base(tmp_path / "other", initializer_range=0.1)
    add_to_hub_cache(tmp_path / "hub", "tiny/Llama", other_form)
    files = find_selector("tiny/Llama")
    with caplog.at_level(logging.WARNING):
        files.require_readable()
    [record] = caplog.records
    assert "are another form than the gates were made on" in record.getMessage()


def test_a_selector_on_the_hub_names_a_base_on_the_hub(base, selector, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    change_config(selector, base="tiny/Llama", revision="c" * 40)
    snapshot = add_to_hub_cache(tmp_path / "hub", "tiny/Gates", selector)
    downloaded = add_to_hub_cache(tmp_path / "hub", "tiny/Llama", base)
    files = find_selector("tiny/Gates")
    assert (files.model, files.gates) == (f"tiny/Llama@{'c' * 40}", snapshot)
    assert files.model_path() == downloaded
    files.require_readable()


def test_a_gguf_file_without_the_package_that_reads_it_is_refused(selector, tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    assert f"GGUF file {file} does not exist" in refusal(file, selector)
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    assert f"{file}: a GGUF file needs `pip install gguf`" in refusal(file, selector)
    assert f"{file}: a GGUF file needs `pip install gguf`" in refusal(file)
