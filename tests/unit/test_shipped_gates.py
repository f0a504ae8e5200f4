"""The gates that ship with the package are whole, small and calibrated for the base they name."""

import pytest

from selectmoe.model.attached_gates import load_gates
from selectmoe.model.selector_files import GatedBaseFiles
from selectmoe.paths import SHIPPED_GATES
from selectmoe.scoring.calibration import Calibration, load_calibration

FOLDERS = sorted(SHIPPED_GATES.iterdir())
MOST_BYTES = 300_000
FEWEST_ROWS = 4_000


def test_gates_for_smollm2_ship_with_the_package():
    assert [folder.name for folder in FOLDERS] == ["smollm2-135m-instruct"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_whole_and_small(folder):
    gates = load_gates(folder)
    assert gates.config.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert gates.weights_L2H.isfinite().all()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_calibration_is_of_these_gates_on_the_base_that_they_name(folder):
    calibration = load_calibration(folder)
    assert isinstance(calibration, Calibration)
    files = GatedBaseFiles(str(folder), folder, load_gates(folder).config)
    assert calibration.weights_hash in files.calibrated_hashes()
    assert calibration.length is not None
    assert calibration.num_samples >= FEWEST_ROWS


def test_every_folder_names_its_licence_in_its_card():
    for folder in FOLDERS:
        assert "\nlicense: " in (folder / "README.md").read_text("utf-8")
