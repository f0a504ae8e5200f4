"""Scores that need no trained gates: answer length, likelihood under the base, untrained gates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from selectmoe.config.warmup import TrainingConfig
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.evaluation.answer_loss import MAX_TOKENS_PER_BATCH, batch_losses
from selectmoe.model.devices import choose_dtype, choose_experts
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.model.modeling_select_moe import SelectMoeForCausalLM
from selectmoe.model.quiet_loading import load_model, register_select_moe
from selectmoe.records import Sample
from selectmoe.warmup.gate_model import load_gated_model

FRESH_GATES_STD = 0.02  # as in converted models; setting it makes a warm-up initialize new gates


def answer_lengths(tokenizer: ChatTokenizer, samples: Sequence[Sample]) -> np.ndarray:
    """Number of answer tokens."""
    return np.array([row.answer_mask.sum() for row in tokenizer.tokenize(samples)])


def answer_nll(model: nn.Module, tokenizer: ChatTokenizer, samples: Sequence[Sample]) -> np.ndarray:
    """Mean negative log-likelihood of the answer tokens, in nats."""
    rows = tokenizer.tokenize(samples)
    nll_by_row = np.empty(len(samples))
    for batch in pad_samples(rows, max_tokens_per_batch=MAX_TOKENS_PER_BATCH):
        nll_B, num_tokens_B = batch_losses(model, batch)
        # An answer that is truncated entirely has no loss: 0.
        nll_by_row[batch.positions] = nll_B / np.maximum(num_tokens_B, 1)
    return nll_by_row


def load_language_model(folder: Path, *, on_gpu: bool) -> SelectMoeForCausalLM:
    """The base model: a Select-MoE whose gates are forced open."""
    register_select_moe()
    model = load_model(
        SelectMoeForCausalLM,
        folder,
        dtype=choose_dtype(None, on_gpu=on_gpu),
        experts_implementation=choose_experts(None, on_gpu=on_gpu),
    ).eval()
    torch.nn.Module.to(model, "cuda" if on_gpu else "cpu")
    model.force_gates_open()
    return model


def save_untrained_gates(
    folder: Path, training: TrainingConfig, *, seed: int, output: Path
) -> Path:
    """Writes the gates that a warm-up with this seed starts from; returns the weights file."""
    register_select_moe()
    model = load_gated_model(folder, training, uses_gpu=False, seed=seed)
    return save_gate_weights(model, output)
