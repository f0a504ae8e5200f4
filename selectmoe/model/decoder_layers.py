"""Finds the decoder layers of a causal language model, and the feed-forward module of each.

A quality gate reads the input of a layer's feed-forward module: for most models what the norm
before it gives, for OLMo 2, which norms behind it, the residual stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from selectmoe.errors import ModelError, list_names

# What transformers' models call the feed-forward block of a layer, dense or of experts.
FEED_FORWARD_NAMES = ("mlp", "block_sparse_moe", "feed_forward", "ffn")


@dataclass(frozen=True, slots=True)
class DecoderLayers:
    """The layers of one model, from its embeddings upwards. All are modules of the model itself."""

    decoder: nn.Module
    """The model without its language-model head: embeddings, layers, final norm."""
    layers: nn.ModuleList
    feed_forward_name: str
    """Name of the feed-forward module in each layer."""
    hidden_size: int

    def feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward module of one layer, which starts at 0."""
        module: nn.Module = getattr(self.layers[layer], self.feed_forward_name)
        return module

    def __len__(self) -> int:
        return len(self.layers)


def decoder_layers(model: nn.Module) -> DecoderLayers:
    """The decoder layers of a causal language model of transformers, with its head or without.

    Raises ModelError, with what was found, for a model that has not one list of decoder layers with
    one feed-forward module each.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None or config is None:
        raise ModelError(f"gates need a language model of transformers, got {name}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"gates need a decoder alone: {name} is an encoder and a decoder")
    text_config = config.get_text_config(decoder=True)
    num_layers = getattr(text_config, "num_hidden_layers", None)
    decoder: Any = get_decoder()
    found = {
        child_name: child
        for child_name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList)
    }
    lists = [child for child in found.values() if len(child) == num_layers]
    if len(lists) != 1:
        lengths = ", ".join(f"{key} with {len(child)}" for key, child in found.items()) or "none"
        raise ModelError(
            f"gates need one list of {num_layers} decoder layers in {type(decoder).__name__} "
            f"({name}), found the lists of modules {lengths}"
        )
    return DecoderLayers(
        decoder=decoder,
        layers=lists[0],
        feed_forward_name=_feed_forward_name(lists[0], name),
        hidden_size=int(text_config.hidden_size),
    )


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module reads, in a forward pre-hook with kwargs: some models pass it by name."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def _feed_forward_name(layers: nn.ModuleList, model: str) -> str:
    by_layer = list(_feed_forward_names(layers))
    names = sorted({name for names in by_layer for name in names})
    if len(names) == 1 and all(by_layer):
        return names[0]
    wrong, found = next(
        (layer, found) for layer, found in enumerate(by_layer) if len(names) > 1 or not found
    )
    if len(names) > 1 and all(len(found) == 1 for found in by_layer):
        raise ModelError(f"{model}: its layers name their feed-forward module {list_names(names)}")
    children = [name for name, _ in layers[wrong].named_children()]
    raise ModelError(
        f"gates need one feed-forward module a layer, called {' or '.join(FEED_FORWARD_NAMES)}: "
        f"layer {wrong} of {model} ({type(layers[wrong]).__name__}) has "
        f"{list_names(found) or 'none'}; its modules are {list_names(children) or 'none'}"
    )


def _feed_forward_names(layers: nn.ModuleList) -> Iterator[list[str]]:
    for layer in layers:
        modules = dict(layer.named_children())
        yield [name for name in FEED_FORWARD_NAMES if name in modules]
