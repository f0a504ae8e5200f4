"""A gate warm-up on one worker in this process, with its rows tokenized first."""

from selectmoe.config.warmup import WarmupConfig
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.base_model import is_base
from selectmoe.warmup.base_stage import run_base_steps
from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer
from selectmoe.warmup.stage import WarmupReport, run_warmup


def warm_up(config: WarmupConfig, worker: TrainingWorker) -> WarmupReport:
    prepare_warmup_rows(config, warmup_tokenizer(config), worker.output)
    run = run_base_steps if config.model and is_base(config.model) else run_warmup
    return run(config, worker)
