"""The Ray task of the evaluate job: runs `evaluate` of the package, offline if there is no hub."""

from collections.abc import Iterator
from typing import Any

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.model.hub_access import hub_answers, work_offline


def evaluate_tasks(config: EvaluateConfig, *, needs_hub: bool, use_gpu: bool) -> Iterator[Any]:
    """Yields a TaskResult per task when it is done.

    needs_hub: a task or the model may have to be downloaded. Otherwise, or if the hub does not
    answer, the hub's clients are set offline, since they would retry for minutes.
    """
    if not (needs_hub and hub_answers()):
        work_offline()
    import torch

    from selectmoe.evaluation.lm_eval_run import evaluate

    if not use_gpu:
        torch.set_num_threads(config.num_cpus)
    yield from evaluate(config, device="cuda" if use_gpu else "cpu")
