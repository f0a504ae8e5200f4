"""What runs on Ray's worker in the evaluate job: `evaluate` of the package, offline or not."""

from collections.abc import Iterator
from typing import Any

from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.model.hub_access import hub_answers, work_offline


def evaluate_tasks(config: EvaluateConfig, *, needs_hub: bool, use_gpu: bool) -> Iterator[Any]:
    """Yields a TaskResult for each task as it is done.

    needs_hub: a task or the model may have to come from the hub. Where it may not, or the hub does
    not answer, the hub's clients are told so: they would try for minutes.
    """
    if not (needs_hub and hub_answers()):
        work_offline()
    import torch

    from selectmoe.evaluation.lm_eval_run import evaluate

    if not use_gpu:
        torch.set_num_threads(config.num_cpus)
    yield from evaluate(config, device="cuda" if use_gpu else "cpu")
