"""What runs on Ray's workers in the pretrain job: a shell around `selectmoe`, nothing more."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.on_ray.training import TrainingWorker
from selectmoe.config.warmup import WarmupConfig
from selectmoe.errors import SelectMoeError

if TYPE_CHECKING:  # it loads torch
    from selectmoe.warmup.stage import TrainingPlace

TOKENIZED_NAME = "tokenized"  # folder of the run with the rows that the driver tokenised


def warm_up(config: WarmupConfig, worker: TrainingWorker) -> dict[str, Any]:
    """One worker's part of stage 1; rank 0 writes into `config.output`.

    Rank 0 alone calibrates: after the last step no worker waits for another, and the weights that
    it has written are those of all.
    """
    import ray.train

    from selectmoe.warmup.stage import TrainingPlace, run_warmup

    output = Path(str(config.output))
    place = TrainingPlace(
        output=output,
        rows=output / TOKENIZED_NAME,
        scratch=worker.scratch,
        rank=worker.rank,
        num_workers=worker.num_workers,
        num_sharing=ray.train.get_context().get_local_world_size(),
        uses_gpu=worker.uses_gpu,
        resume_from=worker.resume_from,
        callbacks=(worker.report_checkpoints(),),
    )
    report = asdict(run_warmup(config, place))
    return report if place.rank > 0 else report | calibrate(config, place, report["weights"])


def calibrate(config: WarmupConfig, place: "TrainingPlace", weights: str) -> dict[str, Any]:
    """What the report says of the calibration. Weights that cannot be scored with are kept, and
    their warm-up is not done again: stage 2 would say the same of them."""
    from selectmoe.scoring.calibration import describe
    from selectmoe.warmup.calibration import calibrate_warmup

    assert place.rows is not None
    try:
        calibration = calibrate_warmup(
            config, rows=place.rows, weights=weights, uses_gpu=place.uses_gpu
        )
    except SelectMoeError as error:
        return {"calibration": None, "calibration_failure": str(error)}
    return {"calibration": describe(calibration)}
