"""Causal attention over packed (variable-length) rows: a token attends to its own row alone.

Shape letters: N = tokens of all rows, R = rows, A = heads, D = head size, B and T = rows and tokens
of a padded batch.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from .modeling_select_moe import SelectMoeModel

Attention = Callable[..., Tensor]
"""(query [N, A, D], key, value, scale=) -> [N, A, D]."""

# Rows are padded together down to three quarters of the longest: 1/8 of padding on average.
PADDED_GROUP_SHARE = 0.75
_KNOWS_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # by release


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The input of one forward pass, on the model's device."""

    token_ids_N: Tensor  # int64
    position_ids_N: Tensor  # int64, 0, 1, … within each row
    cu_seqlens_R1: Tensor  # int32, cumulative lengths: 0, …, N
    lengths: tuple[int, ...]  # on the host: reading cu_seqlens_R1 would wait for the device


def choose_attention(model: SelectMoeModel) -> Callable[[PackedRows], Attention]:
    """Flash attention over rows where the device, the dtype and the heads' size allow it."""
    fits = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    if fits:
        head_size = model.config.hidden_size // model.config.num_attention_heads
        fits = head_size % 8 == 0 and head_size <= 256
        fits = fits and torch.cuda.get_device_capability(model.device) >= (8, 0)
    return varlen_attention if fits else padded_attention


def varlen_attention(rows: PackedRows) -> Attention:
    cu_seqlens_R1, longest = rows.cu_seqlens_R1, max(rows.lengths)

    def attention(query_NAD: Tensor, key_NAD: Tensor, value_NAD: Tensor, *, scale: float) -> Tensor:
        grouped: dict[str, Any] = {}
        if _KNOWS_GROUPED_HEADS:  # a release without the argument takes fewer key heads unasked
            grouped["enable_gqa"] = query_NAD.shape[1] != key_NAD.shape[1]
        mixed_NAD = varlen_attn(
            query_NAD,
            key_NAD,
            value_NAD,
            cu_seqlens_R1,
            cu_seqlens_R1,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # causal
            **grouped,
        )
        assert isinstance(mixed_NAD, Tensor)
        return mixed_NAD

    return attention


def padded_attention(rows: PackedRows) -> Attention:
    """For any device and dtype: rows of similar length are padded on the right, where under a
    causal mask no real token sees the padding."""
    device = rows.token_ids_N.device
    indices, cells = padded_groups(rows.lengths)
    indices_BT = [copy_to(index, device) for index in indices]
    cells_N = copy_to(cells, device)

    def attention(query_NAD: Tensor, key_NAD: Tensor, value_NAD: Tensor, *, scale: float) -> Tensor:
        mixed = []
        for index_BT in indices_BT:
            mixed_BATD = functional.scaled_dot_product_attention(
                query_NAD[index_BT].transpose(1, 2),
                key_NAD[index_BT].transpose(1, 2),
                value_NAD[index_BT].transpose(1, 2),
                is_causal=True,
                scale=scale,
                enable_gqa=query_NAD.shape[1] != key_NAD.shape[1],
            )
            mixed.append(mixed_BATD.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)[cells_N]

    return attention


def padded_groups(lengths: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Gather indices into the packed tokens for each padded batch, int64 [B, T], and the indices
    that gather the N tokens back from all padded batches, flattened and concatenated, int64 [N].

    Padding is the row's last token again. Lengths 4, 1, 3 give
    [[0, 1, 2, 3], [5, 6, 7, 7]] and [[4]], and 0, 1, 2, 3, 8, 4, 5, 6.
    """
    lengths_R = np.array(lengths, dtype=np.int64)
    starts_R = lengths_R.cumsum() - lengths_R
    cells_N = np.empty(lengths_R.sum(), dtype=np.int64)
    indices, num_cells = [], 0
    order = np.argsort(-lengths_R, kind="stable")
    while len(order) and lengths_R[order[0]] > 0:
        longest = lengths_R[order[0]]
        fitting = int((lengths_R[order] >= PADDED_GROUP_SHARE * longest).sum())
        rows_B, order = order[:fitting, None], order[fitting:]
        columns_T = np.arange(longest)
        index_BT = starts_R[rows_B] + np.minimum(columns_T, lengths_R[rows_B] - 1)
        real_BT = columns_T < lengths_R[rows_B]
        cells_BT = num_cells + np.arange(index_BT.size).reshape(index_BT.shape)
        cells_N[index_BT[real_BT]] = cells_BT[real_BT]
        indices.append(index_BT)
        num_cells += index_BT.size
    return indices, cells_N


def copy_to(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only a copy from pinned memory is asynchronous
    return tensor.to(device, non_blocking=True)
