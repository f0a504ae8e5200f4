"""What runs on Ray's workers in the pretrain job: a shell around `selectmoe`, nothing more."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.ray_training import TrainingWorker
from selectmoe.config import WarmupConfig

TOKENIZED_NAME = "tokenized"  # folder of the run with the rows that the driver tokenised


def warm_up(config: WarmupConfig, worker: TrainingWorker) -> dict[str, Any]:
    """One worker's part of stage 1; rank 0 writes into `config.output`."""
    import ray.train

    from selectmoe.training.warmup import TrainingPlace, run_warmup

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
    return asdict(run_warmup(config, place))
