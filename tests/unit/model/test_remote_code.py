"""A converted folder with `--remote-code` loads where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selectmoe.model.checkpoint import read_model_config
from selectmoe.model.conversion import convert_olmoe
from selectmoe.model.remote_code import AUTO_MAP, REMOTE_FILES
from tests.tiny_olmoe import save_tiny_olmoe

PROGRAM = """
import sys
sys.modules["selectmoe"] = None  # any import of the package fails
import json, torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(4, 36)[None]
with torch.no_grad():
    output = model(input_ids=ids, labels=ids)
lm = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=1)
request = Instance("loglikelihood", {}, ("the gate", " is open"), 0)
[(likelihood, _)] = lm.loglikelihood([request], disable_tqdm=True)
print(json.dumps({
    "type": model.config.model_type, "module": type(model).__module__, "loss": output.loss.item(),
    "quality_loss": output.quality_loss.item(), "logits": output.logits.double().sum().item(),
    "likelihood": likelihood,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = save_tiny_olmoe(tmp_path_factory.mktemp("base") / "base")
    settings = {"quality_loss_type": "mse", "quality_loss_weight": 0.5}
    target = tmp_path_factory.mktemp("converted") / "new"
    return convert_olmoe(base, target, remote_code=True, **settings).folder


def test_the_folder_has_the_code_and_names_its_classes(folder):
    assert read_model_config(str(folder))["auto_map"] == AUTO_MAP
    for name in REMOTE_FILES:
        assert (folder / name).read_text("utf-8").startswith('"""')


@pytest.mark.timeout(120)
def test_transformers_and_lm_eval_load_it_without_the_package(folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    environment = os.environ | {"HF_HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["type"] == "select_moe"
    assert found["module"].startswith("transformers_modules.")
    model = AutoModelForCausalLM.from_pretrained(folder)  # by the package's own classes
    assert type(model).__module__ == "selectmoe.model.modeling_select_moe"
    ids = torch.arange(4, 36)[None]
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
        tokens = AutoTokenizer.from_pretrained(folder)
        context, whole = (tokens(text)["input_ids"] for text in ("the gate", "the gate is open"))
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    # float32, the same operations in another process: rounding at most.
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert found["quality_loss"] == pytest.approx(output.quality_loss.item(), rel=1e-6)
    assert found["logits"] == pytest.approx(output.logits.double().sum().item(), rel=1e-5)
    likelihood = sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
    assert found["likelihood"] == pytest.approx(likelihood, rel=1e-5)


def test_the_model_card_says_how_it_is_loaded(folder, tmp_path):
    card = (folder / "README.md").read_text("utf-8")
    assert "register_select_moe()" in card
    assert "trust_remote_code=True" in card
    assert "as initialized, seed 0: train them with stage 1" in card
    assert "base_model:" not in card  # a folder of this machine
    base = save_tiny_olmoe(tmp_path / "base")
    Path(base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    plain = (convert_olmoe(base, tmp_path / "plain").folder / "README.md").read_text("utf-8")
    assert plain.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: apache-2.0\n---\n" in plain
    assert "trust_remote_code" not in plain
