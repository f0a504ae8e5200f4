"""One vector per row: pure functions from hidden states to unit vectors.

Pooling is that of RDS+ (Ivison et al. 2025, "Large-Scale Data Selection for Instruction Tuning"):
the mean of the hidden states h_i of all tokens, prompt included, weighted by position,

    v = sum_i w_i h_i,   w_i = i / (1 + 2 + … + T),

as under a causal mask later tokens have seen more of the row. A longer vector is projected by a
fixed matrix of random signs, which keeps cosines up to an error of about 1 / sqrt(512) (Achlioptas
2003, "Database-friendly random projections").

Shape letters: B = rows, T = tokens of a row, H = hidden size, D = numbers of a vector.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAX_NUMBERS = 512
_SEED = b"selectmoe vector projection"


def vector_size(hidden_size: int) -> int:
    """Numbers of a vector."""
    return min(hidden_size, MAX_NUMBERS)


def row_vectors(hidden_BTH: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """One vector of length 1 per row: float32 [B, D]. Rows are padded on the right."""
    positions_T = torch.arange(1, hidden_BTH.shape[1] + 1, device=hidden_BTH.device)
    weights_BT = (positions_T * attention_mask_BT).float()
    weights_BT = weights_BT / weights_BT.sum(dim=1, keepdim=True)
    pooled_BH = torch.einsum("bth,bt->bh", hidden_BTH.float(), weights_BT)
    hidden_size = pooled_BH.shape[1]
    if hidden_size > MAX_NUMBERS:
        matrix_HD = torch.from_numpy(projection(hidden_size)).to(pooled_BH.device)
        pooled_BH = pooled_BH @ matrix_HD
    return functional.normalize(pooled_BH, dim=1, eps=1e-30)


@functools.cache
def projection(hidden_size: int) -> np.ndarray:
    """Signs divided by sqrt(D), float32 (H, D): the same on every machine and in every version,
    since they are bits of a hash."""
    stream = hashlib.shake_256(_SEED).digest(hidden_size * MAX_NUMBERS // 8)
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8)).astype(np.float32)
    matrix: np.ndarray = (2 * bits - 1).reshape(hidden_size, MAX_NUMBERS) / np.sqrt(MAX_NUMBERS)
    return matrix.astype(np.float32)
