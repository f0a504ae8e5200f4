"""What runs on Ray's workers in the finetune job: a shell around `selectmoe`, nothing more."""

from dataclasses import asdict
from typing import Any

from selectmoe.config.finetune import FinetuneConfig
from selectmoe.training.worker import TrainingWorker


def train_adapter(config: FinetuneConfig, worker: TrainingWorker) -> dict[str, Any]:
    """One worker's part of stage 3, on the rows that the job has tokenized."""
    from selectmoe.finetune.stage import finetune
    from selectmoe.finetune.supervised_data import load_target_tokenizer

    return asdict(finetune(config, load_target_tokenizer(config), worker))
