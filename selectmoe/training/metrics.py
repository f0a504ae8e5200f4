"""Trainer callbacks that write a run's metrics to metrics.jsonl and TensorBoard."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    is_tensorboard_available,
)

from selectmoe.data.writers import whole_file
from selectmoe.training.metrics_lines import METRICS_NAME

TENSORBOARD_NAME = "tensorboard"

logger = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Appends a line to `metrics.jsonl` for each log of rank 0.

    A resumed run first drops the lines of steps that it will compute again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if state.is_world_process_zero and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            if kept != lines:
                with whole_file(self.file) as stream:
                    stream.write("".join(kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        if state.is_world_process_zero and logs and "loss" in logs:
            # One write per line, so that a reader never sees half a line.
            with self.file.open("a", encoding="utf-8") as stream:
                row = {"step": state.global_step, "num_steps": state.max_steps, **logs}
                stream.write(json.dumps(row) + "\n")


class LastStep(TrainerCallback):
    """Logs the last step too, whatever `logging_steps` is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if state.global_step >= state.max_steps:
            control.should_log = True


def tensorboard(folder: Path) -> list[TrainerCallback]:
    """transformers' callback, writing below `folder` instead of beside the checkpoints; none where
    neither tensorboard nor tensorboardX is installed."""
    if not is_tensorboard_available():
        logger.info("no TensorBoard files: they need `pip install tensorboardX`")
        return []
    callback: Any = TensorBoardCallback()
    callback.logging_dir = str(folder / TENSORBOARD_NAME)
    return [callback]


def _step_of(line: str) -> int:
    """A line that a kill has cut short gets a step beyond every other, and is dropped."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return 1 << 62
