"""Entropy of a mixture-of-experts base's routers: how undecided they are about a row's answer.

Shape letters: B = rows, T = tokens of a row, N = B * T, E = experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selectmoe.errors import ConfigError
from selectmoe.model.decoder_layers import DecoderLayers

# What transformers' models call the router of a feed-forward block of experts.
ROUTER_NAMES = ("gate", "router")


def find_routers(layers: DecoderLayers, last_gate: int) -> list[nn.Module]:
    """The routers of the layers below the last quality gate, which are computed in any case.

    Raises ConfigError where there is none.
    """
    routers = list(_routers(layers, last_gate))
    if not routers:
        raise ConfigError(
            "scoring.signals: router_entropy needs a base with experts below its last quality "
            f"gate; the {len(layers)} layers of {type(layers.decoder).__name__} have no router "
            f"below layer {last_gate}"
        )
    return routers


def _routers(layers: DecoderLayers, last_gate: int) -> Iterator[nn.Module]:
    for layer in range(last_gate):
        block = layers.feed_forward(layer)
        children = dict(block.named_children())
        if "experts" in children:
            yield from (children[name] for name in ROUTER_NAMES if name in children)


def token_entropy(output: Any) -> Tensor:  # noqa: ANN401 (of a module of transformers)
    """Entropy of one router's softmax over its experts, in nats: float32 [N].

    output: the logits [N, E], alone or first of several.
    """
    logits_NE: Tensor = (output[0] if isinstance(output, tuple) else output).float()
    log_NE = logits_NE.flatten(0, -2).log_softmax(dim=-1)
    return -(log_NE.exp() * log_NE).sum(dim=-1)


def answer_entropy(entropies: Sequence[Tensor], answer_mask_BT: Tensor) -> Tensor:
    """Mean over routers and answer tokens: float32 [B]; NaN for a row without an answer token.

    entropies: float32 [N] of each router.
    """
    mean_BT = torch.stack(list(entropies)).mean(dim=0).view(answer_mask_BT.shape)
    return torch.where(answer_mask_BT, mean_BT, 0.0).sum(dim=1) / answer_mask_BT.sum(dim=1)
