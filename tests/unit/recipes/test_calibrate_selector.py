"""Calibration of a selector on the rows that the recipes train on."""

import json
import shutil

import pytest

from recipes.calibrate_selector import calibrate_selector, training_rows
from recipes.held_out_rows import is_held_out
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.scoring.engine import ScoringEngine


@pytest.fixture
def selector(tmp_path):
    """The embedded one, as it is before its recipe ends."""
    ignored = shutil.ignore_patterns("calibration.json")
    return shutil.copytree(EMBEDDED_SELECTOR, tmp_path / "selector", ignore=ignored)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = DEMO_CORPUS.read_text("utf-8").splitlines()[:40]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    rows = training_rows([str(file)])
    ids = [json.loads(line)["id"] for line in lines]
    assert [row.sample_id for row in rows] == [row for row in ids if not is_held_out(row)]
    assert len(rows) < 40
    return rows


def test_a_selector_is_calibrated_for_its_weights(selector, training):
    assert ScoringEngine.from_pretrained(selector, device="cpu").calibration is None
    file = calibrate_selector(selector, training, seed=0)
    assert file.parent == selector
    calibration = ScoringEngine.from_pretrained(selector, device="cpu").calibration
    assert calibration.corpus == {"demo": len(training)}


def test_stage_1_weights_are_calibrated_for_any_formula(training, tmp_path):
    engine = ScoringEngine.from_pretrained(device="cpu")
    gates = save_gate_weights(engine.model, tmp_path)
    calibrate_selector(EMBEDDED_SELECTOR, training, seed=0, weights=tmp_path, formula="original")
    loaded = ScoringEngine.from_pretrained(
        model_checkpoint_path=gates, device="cpu", formula="original"
    )
    assert loaded.calibration.formula == "original"
