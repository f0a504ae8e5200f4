"""The scores of the embedded selector, as they were when somebody last looked at them."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# float32 sums in the order of another CPU's vector units; a changed formula moves far more.
TOLERANCE = 2e-6


def test_embedded_selector_scores_as_it_did():
    spec = importlib.util.spec_from_file_location("remake", FOLDER / "remake.py")
    remake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(remake)
    expected = json.loads((FOLDER / "scores.json").read_text("utf-8"))["scores"]
    scores = remake.golden_scores()
    assert scores.keys() == expected.keys()
    for formula, by_row in scores.items():
        assert by_row == pytest.approx(expected[formula], abs=TOLERANCE, rel=0), formula
