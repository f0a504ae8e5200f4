"""Models of the hub, in a cache as the hub's client keeps it; the tests are offline."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file, save_file

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.config.finetune import FinetuneConfig
from selectmoe.config.selection import SelectConfig
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import ConfigError, ModelError, ResumeError
from selectmoe.evaluation import target_model as evaluation
from selectmoe.finetune.stage import load_target
from selectmoe.model.checkpoint import hash_weights, model_folder, read_model_config
from selectmoe.paths import EMBEDDED_SELECTOR, model_or_embedded
from selectmoe.selection.backends import LocalBackend
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.stage import record_model
from selectmoe.training.lora_targets import add_adapter
from selectmoe.training.worker import TrainingWorker

NAME = "someone/selector"
FIRST, SECOND = "a" * 40, "b" * 40


class HubCache:
    """The cache of one model, into which commits are downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models--someone--selector"

    def download(self, commit: str, *, ref: str, change: float = 0.0) -> Path:
        """A snapshot of the embedded selector with changed weights, and the ref that names it."""
        snapshot = self.folder / "snapshots" / commit
        shutil.copytree(EMBEDDED_SELECTOR, snapshot)
        if change:
            tensors = load_file(snapshot / "model.safetensors")
            tensors["model.norm.weight"] += change
            save_file(tensors, snapshot / "model.safetensors", {"format": "pt"})
        self.point(ref, commit)
        return snapshot

    def point(self, ref: str, commit: str) -> None:
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / ref).write_text(commit)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubCache:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return HubCache(tmp_path / "hub")


def test_a_revision_names_the_files_that_are_loaded(hub):
    first = hub.download(FIRST, ref="v1")
    second = hub.download(SECOND, ref="main", change=1.0)
    assert model_folder(NAME) == second
    assert model_folder(model_or_embedded(NAME, "v1")) == first
    assert model_folder(f"{NAME}@{FIRST}") == first
    assert read_model_config(f"{NAME}@v1")["model_type"] == "select_moe"
    with pytest.raises(ModelError, match=f"{NAME}@v3: no such folder, and it could not be"):
        model_folder(f"{NAME}@v3")


def norm_of(model) -> float:
    return model.get_parameter("model.norm.weight")[0].item()


def test_stages_3_and_4_load_the_revision_and_the_adapter_names_it(hub, tmp_path):
    hub.download(FIRST, ref="v1")
    hub.download(SECOND, ref="main", change=1.0)
    config = FinetuneConfig(model=NAME, revision="v1")
    name = model_or_embedded(config.model, config.revision)
    target = load_target(config, name, TrainingWorker(output=tmp_path, scratch=tmp_path))
    evaluated, _ = evaluation.load_target(EvaluateConfig(model=NAME, revision="v1"), device="cpu")
    newest, _ = evaluation.load_target(EvaluateConfig(model=NAME), device="cpu")
    assert norm_of(target) == norm_of(evaluated) == pytest.approx(norm_of(newest) - 1.0)
    # As PEFT and other programs read it: NAME@REVISION is no name on the hub.
    [saved] = add_adapter(target, config.training.lora, model_name=name).peft_config.values()
    assert (saved.base_model_name_or_path, saved.revision) == (NAME, "v1")


@pytest.mark.parametrize("config", [FinetuneConfig, EvaluateConfig, SelectConfig, WarmupConfig])
def test_a_revision_of_no_model_is_refused(config):
    with pytest.raises(ConfigError, match="revision needs a model on the hub, got 'v1' without"):
        config(revision="v1")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model@home").mkdir()
    assert model_folder(str(tmp_path / "model@home")) == tmp_path / "model@home"
    with pytest.raises(ModelError, match="revision=v1 needs the name of a model on the hub"):
        model_folder(model_or_embedded(str(tmp_path), "v1"))


def test_a_hub_model_has_the_hash_of_its_files_and_the_commit_for_a_name(hub):
    hub.download(FIRST, ref="main")
    backend = LocalBackend(SelectConfig(model=NAME))
    assert backend.weights_sha256 == hash_weights(str(EMBEDDED_SELECTOR), None)
    assert backend.model == f"{NAME}@{FIRST}"  # for workers elsewhere
    assert backend.calibration() is not None


def test_a_run_notices_on_resume_that_the_hub_has_other_weights_by_now(hub, tmp_path):
    run = RunFolder(tmp_path)
    hub.download(FIRST, ref="main")
    record_model(run, LocalBackend(SelectConfig(model=NAME)))
    hub.download(SECOND, ref="main", change=1.0)
    with pytest.raises(ResumeError, match="was started with other weights"):
        record_model(run, LocalBackend(SelectConfig(model=NAME)))
    record_model(run, LocalBackend(SelectConfig(model=NAME, revision=FIRST)))
