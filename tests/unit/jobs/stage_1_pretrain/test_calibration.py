"""What a worker of the pretrain job reports."""

import json

from jobs.stage_1_pretrain.command import calibrate
from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.scoring.calibration import CALIBRATION_NAME
from selectmoe.training.tokenized_rows import read_summary
from selectmoe.training.worker import TrainingWorker
from tests.warmup_run import warm_up

SETTINGS = {
    "dataset.subset_ratio": 0.1, "dataset.max_sequence_length": 64, "max_rejected": 1.0,
    "training.num_steps": 1, "training.effective_batch_size": 2,
}  # fmt: skip


def calibrated(folder, **settings):
    """What the report of such a warm-up says of its calibration."""
    config = from_values(WarmupConfig, SETTINGS | settings)
    worker = TrainingWorker(output=folder, scratch=folder / "scratch")
    told = calibrate(config, worker, warm_up(config, worker).weights)
    return read_summary(folder), told


def test_a_calibration_is_reported_without_its_quantiles(tmp_path):
    summary, told = calibrated(tmp_path)
    written = json.loads((tmp_path / CALIBRATION_NAME).read_text("utf-8"))
    assert told["calibration"] == {k: v for k, v in written.items() if "quantiles" not in k}
    assert told["calibration"]["corpus"] == {"demo": summary.num_rows}


def test_weights_that_cannot_be_calibrated_are_kept_and_the_report_says_why(tmp_path):
    """The file of a node whose storage others do not see."""
    config = from_values(WarmupConfig, SETTINGS)
    worker = TrainingWorker(output=tmp_path, scratch=tmp_path / "scratch")
    warm_up(config, worker)
    told = calibrate(config, worker, str(tmp_path / "elsewhere"))
    assert told["calibration"] is None
    assert "must be a weights file" in told["calibration_failure"]
    assert (tmp_path / "full_rank_weights.safetensors").is_file()
    assert not (tmp_path / CALIBRATION_NAME).exists()
