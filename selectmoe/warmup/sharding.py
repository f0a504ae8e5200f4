"""training.strategy=fsdp: the frozen model in shards, the few trained tensors whole on each worker.

torch's own fully_shard, which works with gloo on CPUs too. transformers and accelerate would run
DDP there without a word, and neither keeps the state of an optimizer whose tensors are not sharded.
"""

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from selectmoe.model.modeling_select_moe import SelectMoeDecoderLayer
from selectmoe.warmup.gate_model import MOE_GATES, QUALITY_GATES, TRASH_EXPERTS


def shard_frozen(model: nn.Module, *, uses_gpu: bool) -> None:
    """Leaves on each worker its part of every frozen tensor of the layers, where nearly all of a
    model is; a layer is whole only while it computes.

    The gates stay whole, trained or not: they are kilobytes, and what is saved. So do embeddings
    and head: to shard the model itself would change its class, by which transformers knows that it
    returns the gates' logits.
    """
    layers = [module for module in model.modules() if isinstance(module, SelectMoeDecoderLayer)]
    whole = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        or any(part in f".{name}" for part in (QUALITY_GATES, MOE_GATES, TRASH_EXPERTS))
    }
    for layer in layers:
        fully_shard(layer, ignored_params=whole)
    if uses_gpu:  # what is sharded is there already
        for tensor in chain(model.parameters(), model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.cuda()


def average_gradients(model: nn.Module) -> None:
    """What DDP would do: the mean over the workers of every gradient of a whole tensor."""
    num_workers = torch.distributed.get_world_size()
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together)
    together /= num_workers
    for gradient, mean in zip(
        gradients, together.split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))
