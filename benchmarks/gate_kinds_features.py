"""What gates on a base would read of each row, and how likely the base finds each answer.

On a GPU matrix products are in bfloat16 by autocast, everything else is float32; on a CPU all is
float32.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality_scorers import without_question
from recipes.baseline_scores import answer_nll
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.model.decoder_layers import decoder_layers
from selectmoe.records import Sample, TokenizedSample

# Shape letters: N = rows, L = layers, H = hidden, B = rows of a batch, T = tokens.

MAX_TOKENS_PER_BATCH = {"cuda": 98_304, "cpu": 4_096}
NUM_COMPARED = 150  # rows whose features are computed without autocast too

logger = logging.getLogger(__name__)


def autocast(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and device.type == "cuda")


@torch.inference_mode()
def read_features(
    model: nn.Module, rows: Sequence[TokenizedSample], *, uses_autocast: bool = True
) -> Tensor:
    """Mean input of each layer's feed-forward module over the answer tokens of each row: float32
    [N, L, H], on the device of the model. Every row has an answer token."""
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    features_NLH = torch.empty((len(rows), len(layers), layers.hidden_size), device=device)
    started, weights_BT = time.perf_counter(), torch.empty(0)
    means: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with autocast(device, enabled=False):  # else the mean over the tokens is in bfloat16
            hidden_BTH = inputs[0].float().view(*weights_BT.shape, -1)
            means.append(torch.einsum("bth,bt->bh", hidden_BTH, weights_BT))

    with ExitStack() as stack:
        for layer in range(len(layers)):
            handle = layers.feed_forward(layer).register_forward_pre_hook(keep)
            stack.callback(handle.remove)
        stack.enter_context(autocast(device, enabled=uses_autocast))
        budget = MAX_TOKENS_PER_BATCH[device.type]
        for batch in pad_samples(rows, max_tokens_per_batch=budget):
            answer_BT = torch.from_numpy(batch.answer_mask).float().to(device)
            weights_BT = answer_BT / answer_BT.sum(dim=1, keepdim=True)
            means.clear()
            # No attention mask: padding is on the right, and causal attention never looks there.
            decoder: Any = layers.decoder
            decoder(input_ids=torch.from_numpy(batch.token_ids).to(device), use_cache=False)
            features_NLH[torch.from_numpy(batch.positions).to(device)] = torch.stack(means, dim=1)
    _log_speed(rows, started)
    return features_NLH


def autocast_error(
    model: nn.Module, rows: Sequence[TokenizedSample], features_NLH: Tensor
) -> list[float]:
    """Relative error of the features by layer, against float32 without autocast, on some rows."""
    chosen = np.random.default_rng(1).choice(len(rows), min(NUM_COMPARED, len(rows)), replace=False)
    exact_NLH = read_features(model, [rows[n] for n in chosen], uses_autocast=False)
    some_NLH = features_NLH[torch.from_numpy(chosen).to(features_NLH.device)]
    errors_NL = (some_NLH - exact_NLH).norm(dim=2) / exact_NLH.norm(dim=2)
    errors: list[float] = errors_NL.mean(dim=0).tolist()
    return errors


def likelihoods(
    model: nn.Module, tokenizer: ChatTokenizer, samples: Sequence[Sample]
) -> tuple[np.ndarray, np.ndarray]:
    """NLL of each answer given its question, and PMI: NLL of the answer alone minus that; (N,)."""
    with autocast(next(model.parameters()).device):
        given_N = answer_nll(model, tokenizer, samples)
        alone_N = answer_nll(model, tokenizer, [without_question(row) for row in samples])
    return given_N, alone_N - given_N


def _log_speed(rows: Sequence[TokenizedSample], started: float) -> None:
    num_tokens = sum(len(row.token_ids) for row in rows)
    seconds = time.perf_counter() - started
    logger.info("features of %d rows: %.0f tokens/s", len(rows), num_tokens / seconds)
