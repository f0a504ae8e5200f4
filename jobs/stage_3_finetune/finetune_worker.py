"""What runs on Ray's workers in the finetune job: a shell around `selectmoe`, nothing more."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.on_ray.training import TrainingWorker
from selectmoe.config.finetune import FinetuneConfig

TOKENIZED_NAME = "tokenized"


def train_adapter(config: FinetuneConfig, worker: TrainingWorker) -> dict[str, Any]:
    """One worker's part of stage 3, on the rows that the job has tokenised into `config.output`."""
    import ray.train

    from selectmoe.finetune.stage import TrainingPlace, finetune
    from selectmoe.finetune.supervised_data import SupervisedRows, load_target_tokenizer

    output = Path(str(config.output))
    place = TrainingPlace(
        checkpoints=worker.scratch,
        resume_from=worker.resume_from,
        uses_gpu=worker.uses_gpu,
        num_workers=worker.num_workers,
        num_sharing=ray.train.get_context().get_local_world_size(),
    )
    report = finetune(
        config,
        SupervisedRows(output / TOKENIZED_NAME),
        load_target_tokenizer(config),
        place,
        output=output,
        callbacks=[worker.report_checkpoints()],
    )
    return asdict(report)
