"""A selection run keeps the weights and the calibration that it started with."""

import pytest

from selectmoe.config.engine import EngineConfig
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ResumeError
from selectmoe.model.checkpoint import hash_weights
from selectmoe.scoring.calibration import load_calibration, save_calibration
from selectmoe.selection.backends import LocalBackend
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.stage import record_model
from tests.calibrations import raw_calibration


@pytest.fixture
def folder(tmp_path):
    """Of a run that starts; beside it a folder of weights that have a calibration."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "select_moe"}')
    (tmp_path / "run").mkdir()
    calibrated(tmp_path, [0.25, 0.75])
    return RunFolder(tmp_path / "run")


def calibrated(tmp_path, scores, *, weights_hash=None):
    weights = tmp_path / "weights"
    ours = weights_hash or hash_weights(str(weights), None)
    save_calibration(weights, raw_calibration(scores, weights_hash=ours))


def backend(folder):
    return LocalBackend(SelectConfig(model=str(folder.root.parent / "weights")))


def test_a_run_keeps_the_calibration_that_it_started_with(folder):
    record_model(folder, backend(folder))
    calibrated(folder.root.parent, [0.1, 0.2, 0.3])
    record_model(folder, backend(folder))
    assert load_calibration(folder.root).num_samples == 2


def test_a_run_that_started_without_a_calibration_continues_without(folder):
    """One whose weights were calibrated meanwhile."""
    (folder.root.parent / "weights" / "calibration.json").unlink()
    record_model(folder, backend(folder))
    calibrated(folder.root.parent, [0.1, 0.2, 0.3])
    record_model(folder, backend(folder))
    assert load_calibration(folder.root) is None


def test_a_run_is_not_resumed_with_other_weights(folder):
    record_model(folder, backend(folder))
    (folder.root.parent / "weights" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ResumeError, match="was started with other weights"):
        record_model(folder, backend(folder))


def test_a_calibration_of_other_weights_or_another_formula_is_not_used(folder, caplog):
    weights = folder.root.parent / "weights"
    calibrated(folder.root.parent, [0.5], weights_hash="abc")
    assert LocalBackend(SelectConfig(model=str(weights))).calibration() is None
    calibrated(folder.root.parent, [0.5])
    assert LocalBackend(SelectConfig(model=str(weights))).calibration().num_samples == 1
    other = SelectConfig(model=str(weights), scoring=EngineConfig(formula="original"))
    assert LocalBackend(other).calibration() is None
    assert caplog.text.count("no percentiles: calibration.json was made for ") == 2
