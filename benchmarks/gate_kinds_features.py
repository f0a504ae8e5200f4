"""What gates on a base would read of each row, and how likely the base finds each answer.

On a GPU matrix products are in bfloat16 by autocast, everything else is float32; on a CPU all is
float32.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality_scorers import without_question
from recipes.baseline_scores import answer_nll
from selectmoe.data.chat import ChatTokenizer
from selectmoe.records import Sample, TokenizedSample
from selectmoe.warmup.gate_features import gate_features

# Shape letters: N = rows, L = layers, H = hidden.

MAX_TOKENS_PER_BATCH = {"cuda": 98_304, "cpu": 4_096}
NUM_COMPARED = 150  # rows whose features are computed without autocast too

logger = logging.getLogger(__name__)


def autocast(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and device.type == "cuda")


def read_features(
    model: nn.Module, rows: Sequence[TokenizedSample], *, uses_autocast: bool = True
) -> Tensor:
    """Mean input of each layer's feed-forward module over the answer tokens of each row: float32
    [N, L, H], on the device of the model."""
    device, started = next(model.parameters()).device, time.perf_counter()
    with autocast(device, enabled=uses_autocast):
        features_NLH = gate_features(
            model, rows, max_tokens_per_batch=MAX_TOKENS_PER_BATCH[device.type]
        )
    num_tokens = sum(len(row.token_ids) for row in rows)
    speed = num_tokens / (time.perf_counter() - started)
    logger.info("features of %d rows: %.0f tokens/s", len(rows), speed)
    return torch.from_numpy(features_NLH).to(device)


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
