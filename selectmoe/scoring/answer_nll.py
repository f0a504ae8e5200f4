"""Negative log-likelihood of answers, with the logits of few tokens at a time.

Shape letters: B = rows, T = tokens of a row, H = hidden size, N = answer tokens of all rows.
"""

import torch
from torch import Tensor
from torch.nn import functional

from selectmoe.model.language_model_head import LanguageModelHead

# Logits that are in memory at a time: 40 MiB in float32, and as much again for their softmax. At
# 49,152 entries these are 213 tokens, enough for a matrix product at full speed. Above 32 MiB glibc
# gives each tensor pages of its own and takes them back; below, its heap grew with each chunk: 427
# instead of 91 MB for 1,700 tokens.
MAX_LOGITS = 10 * 2**20


def answer_nll(
    head: LanguageModelHead,
    hidden_BTH: Tensor,
    token_ids_BT: Tensor,
    answer_mask_BT: Tensor,
    *,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Mean negative log-likelihood of the answer tokens of each row given all tokens before them,
    in nats: float64 [B]. The first token of a row has no prediction; NaN where no other counts.

    hidden_BTH: last hidden states, which the head reads. Only those before an answer token are
    read, so memory does not grow with the prompt or the vocabulary.
    """
    counted_BT = answer_mask_BT[:, 1:].bool()
    hidden_NH = hidden_BTH[:, :-1][counted_BT]
    targets_N = token_ids_BT[:, 1:][counted_BT]
    size = max(max_logits // head.vocab_size, 1)
    parts = [
        functional.cross_entropy(head(hidden), targets, reduction="none")
        for hidden, targets in zip(hidden_NH.split(size), targets_N.split(size), strict=True)
    ]
    # Back into rows: a sum over a row then has one order, where a scatter-add on CUDA has none.
    nll_BT = torch.zeros(counted_BT.shape, dtype=torch.float64, device=hidden_BTH.device)
    nll_BT[counted_BT] = torch.cat(parts).double()
    return nll_BT.sum(dim=1) / counted_BT.sum(dim=1)
