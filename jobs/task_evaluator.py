"""What runs on Ray's worker in the evaluate job: `evaluate` of the package, offline or not."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from selectmoe.target_config import EvaluateConfig

HUB = "https://huggingface.co"
HUB_TIMEOUT_SECONDS = 5.0


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


def work_offline() -> None:
    """Must come before the hub's clients are imported: they look only then."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


def hub_answers(*, timeout_seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """True where the hub answers anything at all; by a proxy too, if the environment names one."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=timeout_seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.append(True)

    # In a thread of its own: looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return bool(answered)
