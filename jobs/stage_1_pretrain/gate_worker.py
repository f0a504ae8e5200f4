"""What runs on Ray's workers in the pretrain job: a shell around `selectmoe`, nothing more."""

from dataclasses import asdict
from typing import Any

from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import SelectMoeError
from selectmoe.training.worker import TrainingWorker


def warm_up(config: WarmupConfig, worker: TrainingWorker) -> dict[str, Any]:
    """One worker's part of stage 1; rank 0 writes into the run's folder.

    Rank 0 alone calibrates: after the last step no worker waits for another, and the weights that
    it has written are those of all.
    """
    from selectmoe.warmup.stage import run_warmup

    report = asdict(run_warmup(config, worker))
    return report if worker.rank > 0 else report | calibrate(config, worker, report["weights"])


def calibrate(config: WarmupConfig, worker: TrainingWorker, weights: str) -> dict[str, Any]:
    """What the report says of the calibration. Weights that cannot be scored with are kept, and
    their warm-up is not repeated: stage 2 would fail with the same error."""
    from selectmoe.scoring.calibration import describe
    from selectmoe.warmup.calibration import calibrate_warmup

    try:
        calibration = calibrate_warmup(config, worker, weights=weights)
    except SelectMoeError as error:
        return {"calibration": None, "calibration_failure": str(error)}
    return {"calibration": describe(calibration)}
