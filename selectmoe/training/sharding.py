"""Sharding for training.strategy=fsdp: frozen layers are sharded, trained tensors replicated.

It uses torch's fully_shard, which works with gloo on CPUs too. On CPUs transformers and accelerate
would silently run DDP, and neither saves the state of an optimizer whose tensors are not sharded.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import Trainer

from selectmoe.errors import ModelError


def shard_frozen(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    uses_gpu: bool,
    keeps: Callable[[str], bool] = lambda name: False,
) -> None:
    """Shards every frozen tensor of the layers, which hold nearly all of a model; a layer is
    gathered only while it computes.

    keeps: names of frozen tensors that stay replicated, beside all trained ones, embeddings and
    head. Sharding the model itself would change its class, by which transformers knows what it
    returns.
    """
    replicated = {
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or keeps(name)
    }
    for layer in layers:
        fully_shard(layer, ignored_params=replicated)
    if uses_gpu:  # shards are on the GPU already
        for tensor in chain(model.parameters(), model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.cuda()


def decoder_layers(model: Any) -> list[nn.Module]:  # noqa: ANN401 (a PreTrainedModel)
    """The layers of a transformers model, by the classes that it names as not to be split.

    Raises ModelError where it names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"training.strategy=fsdp cannot be used with {type(model).__name__}: it does not say "
            "which modules are its layers (_no_split_modules)"
        )
    return layers


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of replicated tensors over the workers, as DDP would."""
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    together = parameters_to_vector(gradients)
    torch.distributed.all_reduce(together)
    vector_to_parameters(together / torch.distributed.get_world_size(), gradients)


class ShardableTrainer(Trainer):
    """A Trainer that leaves a model alone that `shard_frozen` has sharded, without DDP; the
    subclass averages the gradients."""

    def __init__(self, *args: Any, is_sharded: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        self.is_sharded = is_sharded  # before super().__init__, which moves the model
        super().__init__(*args, **kwargs)
        # Makes Trainer leave the model as it is, without DDP. Set only now: its constructor would
        # refuse to save the optimizer, whose tensors are not sharded here.
        self.is_distributed_loading_by_transformers = is_sharded

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leaves shards, which are on their device already."""
        if not self.is_sharded:
            super()._move_model_to_device(model, device)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing to do: all workers start from the same tensors, and gradients are averaged."""
