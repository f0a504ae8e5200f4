"""A selection run gives percentiles by the calibration that it began with, or by none."""

import pytest

from jobs.stage_2_selection.score_corpus import MODEL_NAME, keep_calibration
from jobs.stage_2_selection.scoring_places import own_actors
from selectmoe.config.engine import ScoringConfig
from selectmoe.config.selection import SelectConfig
from selectmoe.model.checkpoint import hash_weights
from selectmoe.scoring.calibration import calibrate, load_calibration, save_calibration
from selectmoe.selection.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    """Of a run that begins, beside one of weights that have a calibration."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "run").mkdir()
    calibrated(tmp_path, [0.25, 0.75])
    return RunFolder(tmp_path / "run")


def calibrated(tmp_path, scores, *, weights_hash="abc"):
    calibration = calibrate(
        scores, formula="answer_margin", max_sequence_length=64, weights_hash=weights_hash,
        corpus={"warm": len(scores)},
    )  # fmt: skip
    save_calibration(tmp_path / "weights", calibration)


def keep(folder):
    keep_calibration(folder, lambda: load_calibration(folder.root.parent / "weights"))
    return load_calibration(folder.root)


def test_a_run_keeps_the_calibration_that_it_began_with(folder):
    assert keep(folder).num_samples == 2
    (folder.root / MODEL_NAME).touch()  # the run has begun
    calibrated(folder.root.parent, [0.1, 0.2, 0.3])
    assert keep(folder).num_samples == 2


def test_a_run_that_began_without_a_calibration_goes_on_without(folder):
    """One of an older version, or whose weights were calibrated meanwhile."""
    (folder.root / MODEL_NAME).touch()
    assert keep(folder) is None


def test_a_calibration_of_other_weights_or_another_formula_is_not_kept(folder, caplog):
    weights = folder.root.parent / "weights"
    assert own_actors(SelectConfig(model=str(weights))).read_calibration() is None
    calibrated(weights.parent, [0.5], weights_hash=hash_weights(str(weights), None))
    assert own_actors(SelectConfig(model=str(weights))).read_calibration().num_samples == 1
    other = SelectConfig(model=str(weights), scoring=ScoringConfig(formula="original"))
    assert own_actors(other).read_calibration() is None
    assert caplog.text.count("no percentiles: calibration.json was made for ") == 2
