import pytest

from selectmoe.errors import ModelError
from selectmoe.training.adapter_folder import adapter_folder


def make_adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_an_adapter_is_itself(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    assert adapter_folder(adapter) == adapter


def test_a_run_of_stage_3_stands_for_its_last_checkpoint(tmp_path):
    for step in (8, 9, 10):
        make_adapter(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-99").mkdir()  # one that is not whole
    assert adapter_folder(tmp_path) == tmp_path / "checkpoint-10"


def test_the_final_adapter_of_a_run_comes_before_its_checkpoints(tmp_path):
    make_adapter(tmp_path / "checkpoint-10")
    assert adapter_folder(tmp_path) == tmp_path / "checkpoint-10"
    make_adapter(tmp_path / "adapter")
    assert adapter_folder(tmp_path) == tmp_path / "adapter"


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        adapter_folder(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"contains neither adapter_config\.json nor a checkp"):
        adapter_folder(tmp_path)
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        adapter_folder(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        adapter_folder(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        adapter_folder(adapter)
