"""Sharding for training.strategy=fsdp: frozen layers are sharded, trained tensors replicated.

It uses torch's fully_shard, which works with gloo on CPUs too. On CPUs transformers and accelerate
would silently run DDP, and neither saves the state of an optimizer whose tensors are not sharded.
"""

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from selectmoe.model.modeling_select_moe import SelectMoeDecoderLayer
from selectmoe.warmup.gate_model import MOE_GATES, QUALITY_GATES, TRASH_EXPERTS


def shard_frozen(model: nn.Module, *, uses_gpu: bool) -> None:
    """Shards every frozen tensor of the layers, which hold nearly all of a model; a layer is
    gathered only while it computes.

    The gates stay replicated, trained or not: they are kilobytes, and checkpoints contain them. So
    do embeddings and head: sharding the model itself would change its class, by which transformers
    knows that it returns the gates' logits.
    """
    layers = [module for module in model.modules() if isinstance(module, SelectMoeDecoderLayer)]
    replicated = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        or any(part in f".{name}" for part in (QUALITY_GATES, MOE_GATES, TRASH_EXPERTS))
    }
    for layer in layers:
        fully_shard(layer, ignored_params=replicated)
    if uses_gpu:  # shards are on the GPU already
        for tensor in chain(model.parameters(), model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.cuda()


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of replicated tensors over the workers, as DDP would."""
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    together = parameters_to_vector(gradients)
    torch.distributed.all_reduce(together)
    vector_to_parameters(together / torch.distributed.get_world_size(), gradients)
