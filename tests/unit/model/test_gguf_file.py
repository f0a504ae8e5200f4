"""A GGUF file is loaded as the model and the tokenizer that it was made from."""

import pytest
import torch
from transformers import LlamaForCausalLM

from selectmoe.errors import ModelError
from selectmoe.model.gguf_file import load_gguf
from tests.tiny_gguf import tiny_llama, write_gguf


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def test_the_loaded_model_computes_what_the_written_one_does_and_can_be_saved(
    model, file, tmp_path
):
    loaded, _ = load_gguf(file)
    token_ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits)
        loaded.save_pretrained(tmp_path / "saved")
        saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(saved(token_ids).logits, loaded(token_ids).logits)
    assert not hasattr(saved.config, "quantization_config")


def test_digits_are_split_before_white_space_as_smollm_does(file, model, tmp_path):
    _, tokenizer = load_gguf(file)
    assert tokenizer.tokenize("he\n\n 12") == ["he", "ĊĊĠ", "1", "2"]
    _, other = load_gguf(write_gguf(tmp_path / "other.gguf", model, pre="gpt-2"))
    assert other.tokenize("he\n\n 12") == ["he", "ĊĊ", "Ġ", "1", "2"]


def test_the_chat_template_and_the_maximum_length_come_with_the_tokenizer(file):
    _, tokenizer = load_gguf(file)
    assert "im_start" in tokenizer.chat_template
    assert tokenizer.model_max_length == 64


def test_what_is_no_gguf_file_is_refused_in_one_line(file, tmp_path):
    missing, text, cut = (tmp_path / name for name in ("none.gguf", "text.gguf", "cut.gguf"))
    text.write_text("not a model")
    cut.write_bytes(file.read_bytes()[:200])
    for path, reason in (
        (missing, "does not exist"), (text, "is not a GGUF file"), (cut, "cannot be loaded"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=reason) as refusal:
            load_gguf(path)
        assert "\n" not in str(refusal.value)
        assert str(path) in str(refusal.value)


def test_without_the_package_gguf_the_refusal_names_it(file, monkeypatch):
    monkeypatch.setattr("selectmoe.model.gguf_file.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        load_gguf(file)
