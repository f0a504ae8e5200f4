"""Contrastive warm-up of the gates of a model in memory, in this process."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from selectmoe.config.warmup import TrainingConfig
from selectmoe.corruptions.kinds import CORRUPTIONS
from selectmoe.data.chat import ChatTokenizer
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.records import Sample
from selectmoe.training.metrics_lines import metrics_line
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.gate_model import prepare_trainee
from selectmoe.warmup.stage import save_trained, step_settings, train
from selectmoe.warmup.step_batches import StepBatches, TrainingRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateWarmup:
    """Settings of the warm-up."""

    num_steps: int = 1_000
    """Optimizer steps."""
    batch_size: int = 8
    """Samples per optimizer step, without their corrupted copies."""
    learning_rate: float = 5e-3
    """Peak learning rate of the cosine schedule."""
    max_tokens_per_batch: int = 8_192
    """Maximum tokens per forward pass, padding included."""
    max_sequence_length: int = 512
    """Longer samples are truncated."""
    kinds: tuple[str, ...] = tuple(CORRUPTIONS)
    """Kinds of corrupted copies."""
    label_weight: float = 0.5
    """Weight of the label form of the loss; the rest ranks a sample above its own copy."""
    seed: int = 0
    """Random seed of the order, the kinds and the corruptions."""


class LogLines(TrainerCallback):
    """One log line for each log of Trainer."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        if logs and "loss" in logs:
            row = {"step": state.global_step, "num_steps": state.max_steps, **logs}
            logger.info("%s", metrics_line(row))


def warm_up_gates(
    model: SelectMoeModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    settings: GateWarmup,
    output: Path,
) -> Path:
    """Trains the gates of `model` in place; returns the written `full_rank_weights.safetensors`."""
    training = TrainingConfig(
        num_steps=settings.num_steps,
        effective_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_tokens_per_batch=settings.max_tokens_per_batch,
        corruptions=settings.kinds,
        label_weight=settings.label_weight,
        logging_steps=max(settings.num_steps // 20, 1),
        save_steps=settings.num_steps,
    )
    worker = TrainingWorker(
        output=output, scratch=output, uses_gpu=torch.cuda.is_available(), callbacks=(LogLines(),)
    )
    chat = ChatTokenizer(tokenizer, max_sequence_length=settings.max_sequence_length)
    rows = TrainingRows(samples, chat.tokenize(samples))
    batches = StepBatches(rows, chat, step_settings(training, worker, seed=settings.seed))
    trainee = prepare_trainee(model, training, name="the model", seed=settings.seed)
    return save_trained(train(trainee, batches, training, worker=worker), worker)
