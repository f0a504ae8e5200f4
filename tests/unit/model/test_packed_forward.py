"""The packed pass on the meta device, which has no numbers: whatever has to look at one raises
there, as it would wait on a GPU."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selectmoe.model.configuration_select_moe import SelectMoeConfig
from selectmoe.model.modeling_select_moe import SelectMoeModel
from selectmoe.model.packed_attention import PackedRows, padded_groups, varlen_attention
from selectmoe.model.packed_forward import PackedForward, bytes_per_token

OLMOE = {"vocab_size": 50_304, "hidden_size": 2_048, "intermediate_size": 1_024,
         "num_hidden_layers": 3, "num_attention_heads": 16, "num_experts": 64,
         "num_experts_per_tok": 8}  # fmt: skip
SMALL = {"vocab_size": 4_096, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
SMALL_EXPERTS = {**SMALL, "hidden_size": 512, "intermediate_size": 128, "num_experts_per_tok": 1}
NUM_ROWS, ROW_LENGTH = 128, 512
NUM_TOKENS = NUM_ROWS * ROW_LENGTH


def model_on_meta(**settings):
    config = SelectMoeConfig(pad_token_id=None, eos_token_id=None, **settings)
    with torch.device("meta"):
        return SelectMoeModel(config).to(torch.bfloat16).eval()


def rows_on_meta():
    position_ids_N = torch.empty(NUM_TOKENS, dtype=torch.int64, device="meta")
    edges_R1 = torch.empty(NUM_ROWS + 1, dtype=torch.int32, device="meta")
    return PackedRows(position_ids_N, position_ids_N, edges_R1, (ROW_LENGTH,) * NUM_ROWS)


class AliveBytes(TorchDispatchMode):
    """Adds up the memory of tensors that are alive, but for those of a model."""

    def __init__(self, model):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in model.parameters())
        self.seen.update(tensor.untyped_storage() for tensor in model.buffers())

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        output = operator(*arguments, **(named or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())
        return output

    def _free(self, num_bytes):
        self.alive -= num_bytes


@pytest.mark.parametrize("settings", [OLMOE, SMALL, SMALL_EXPERTS])
def test_nothing_in_a_pass_looks_at_a_number_and_its_memory_is_what_the_budget_counts(settings):
    model = model_on_meta(**settings)
    forward = PackedForward(model, attention=varlen_attention)
    with AliveBytes(model) as memory:
        logits_LN2 = forward.quality_logits(rows_on_meta())
    assert (logits_LN2.shape, logits_LN2.dtype) == ((3, NUM_TOKENS, 2), torch.float32)
    counted = bytes_per_token(model.config, model.dtype)
    # Less would be an out-of-memory error on a GPU, much more a batch of half its size.
    assert 0.75 * counted < memory.peak / NUM_TOKENS <= counted


def test_a_pass_that_looks_at_numbers_would_be_found_out():
    model = model_on_meta(**SMALL)
    model.set_experts_implementation("eager")  # asks which experts have tokens
    hidden_BTH = torch.empty(1, NUM_TOKENS, 128, dtype=torch.bfloat16, device="meta")
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        model.layers[0].mlp(hidden_BTH)


@pytest.mark.parametrize("trash", ["noise", "custom"])
def test_neither_do_trash_experts(trash):
    forward = PackedForward(
        model_on_meta(**SMALL, trash_expert_mode=trash), attention=varlen_attention
    )
    assert forward.quality_logits(rows_on_meta()).shape == (3, NUM_TOKENS, 2)


@pytest.mark.parametrize(
    "lengths", [(5,), (4, 1, 3), (7, 7, 7), (1, 2, 3, 40, 31, 30, 29), (2, 0, 3)]
)
def test_each_token_stands_once_in_a_padded_batch_of_rows_of_similar_length(lengths):
    indices, cells = padded_groups(lengths)
    by_cell = np.concatenate([index.ravel() for index in indices])
    np.testing.assert_array_equal(by_cell[cells], np.arange(sum(lengths)))
    starts = np.cumsum(lengths) - np.array(lengths)
    for index in indices:
        for row in index:  # a row of a padded batch is one row from its start, and then padding
            length = lengths[np.flatnonzero((starts == row[0]) & (np.array(lengths) > 0))[0]]
            assert row.tolist() == [row[0] + min(n, length - 1) for n in range(len(row))]
            assert length >= 0.75 * len(row)
