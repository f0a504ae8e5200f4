"""Quality gates on any base: they read the input of a layer's feed-forward module, and only read.

The base computes what it computes without them. For scoring it is cut at the last gated layer:
above that gate nothing is computed, neither the layer's feed-forward module nor a head.

Shape letters: L = gates, B = rows, T = tokens, H = hidden size of the base.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from selectmoe.data.writers import whole_file
from selectmoe.errors import ModelError, first_line
from selectmoe.model.decoder_layers import DecoderLayers, decoder_layers, module_input
from selectmoe.model.gates_card import write_gates_card
from selectmoe.model.gates_config import (
    GATES_NAME,
    GatesConfig,
    file_sha256,
    read_gates_config,
    write_gates_config,
)

_Margins = dict[int, Tensor]
# What the gates of the running forward pass have read; None where nobody asks for it.
_read: ContextVar[_Margins | None] = ContextVar("read_margins", default=None)


@dataclass(frozen=True, slots=True, eq=False)  # == on tensors gives no single answer
class GateSet:
    """The gates of one base. Raises ModelError where they do not fit the configuration."""

    config: GatesConfig
    weights_L2H: Tensor
    """float32, by the order of `config.layers`; index 0 of the two logits is "good"."""
    biases_L2: Tensor
    """float32."""

    def __post_init__(self) -> None:
        num_gates, hidden_size = len(self.config.layers), self.config.hidden_size
        shapes = {"weights": (num_gates, 2, hidden_size), "biases": (num_gates, 2)}
        for name, tensor in (("weights", self.weights_L2H), ("biases", self.biases_L2)):
            if tuple(tensor.shape) != shapes[name]:
                raise ModelError(
                    f"{name} of {num_gates} gates must have the shape {shapes[name]}, "
                    f"got {tuple(tensor.shape)}"
                )


def save_gates(folder: Path, gates: GateSet) -> Path:
    """Writes `gates.safetensors`, the card and, last, `gates_config.json`; returns the path of the
    first.

    Each is whole or absent. Of gates that are replaced by others, an interrupted run leaves two
    files that do not fit, which loading refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(gates.config.layers):
        for name, stacked in (("weight", gates.weights_L2H), ("bias", gates.biases_L2)):
            tensor = stacked[index].detach().to("cpu", torch.float32)
            tensors[f"layers.{layer}.{name}"] = tensor.clone().contiguous()
    path = folder / GATES_NAME
    with whole_file(path) as file:
        file.write(save(tensors))
    write_gates_card(folder, gates.config)
    write_gates_config(folder, replace(gates.config, gates_sha256=file_sha256(path)))
    return path


def load_gates(folder: Path) -> GateSet:
    """What `save_gates` wrote. Raises ModelError where a file is missing, broken or does not fit
    the other."""
    config = read_gates_config(folder)
    file = folder / GATES_NAME
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable weights file: {first_line(error)}") from error
    names = [f"layers.{layer}.{part}" for layer in config.layers for part in ("weight", "bias")]
    for wrong in sorted(tensors.keys() ^ set(names)):
        has = "has an unknown tensor" if wrong in tensors else "lacks the tensor"
        raise ModelError(f"{file}: {has} {wrong!r}")
    try:
        weights_L2H, biases_L2 = (
            torch.stack([tensors[name].float() for name in names[first::2]]) for first in (0, 1)
        )
        return GateSet(config, weights_L2H, biases_L2)
    except (RuntimeError, ModelError) as error:
        raise ModelError(f"{file}: {first_line(error)}") from error


class AttachedGates:
    """A base with its gates, frozen and in evaluation mode: gives the margins of all gates in one
    forward pass."""

    def __init__(self, model: nn.Module, layers: DecoderLayers, gates: GateSet) -> None:
        """`attach_gates` makes one."""
        self.model = model.eval().requires_grad_(False)
        self.layers = layers
        self.gates = gates
        self.num_layers = len(gates.config.layers)
        self._is_cut = False
        # The margin is one product: (W_good - W_trash) u + (b_good - b_trash).
        self._weights_LH = gates.weights_L2H[:, 0] - gates.weights_L2H[:, 1]
        self._biases_L = gates.biases_L2[:, 0] - gates.biases_L2[:, 1]
        self._hooks = [
            self._attach(index, layers.feed_forward(layer))
            for index, layer in enumerate(gates.config.layers)
        ]
        self.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.layers.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base; gates are float32."""
        return next(self.layers.decoder.parameters()).dtype

    @property
    def max_positions(self) -> int | None:
        """Positions that the base was made for; None where it does not say."""
        config: Any = self.layers.decoder.config
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None

    @property
    def vocab_size(self) -> int:
        """Number of the base's token embeddings."""
        embeddings: Any = self.layers.decoder.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])

    def to(self, device: torch.device | str) -> "AttachedGates":
        self.model.to(device)
        self._weights_LH = self._weights_LH.to(device)
        self._biases_L = self._biases_L.to(device)
        return self

    def detach(self) -> None:
        """Removes the gates from the model, which was never changed (unless it was cut)."""
        for hook in self._hooks:
            hook.remove()

    def cut(self) -> None:
        """For scoring: removes what lies above the last gate, and the head. The model is no
        language model any more. A second call does nothing."""
        if self._is_cut:
            return
        self._is_cut = True
        last = self.gates.config.layers[-1]
        del self.layers.layers[last + 1 :]
        end = _LastGate()
        self._hooks[-1].remove()
        self._hooks[-1] = self._attach(self.num_layers - 1, end)
        setattr(self.layers.layers[last], self.layers.feed_forward_name, end)
        self.model = self.layers.decoder

    def margins(self, token_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Good logit minus trash logit of every gate at every token: float32 [L, B, T].

        attention_mask_BT: of rows that are padded on the right; needed only where a token attends
        to later ones, see `needs_mask`.
        """
        decoder: Any = self.layers.decoder
        with self.reading() as margins, suppress(_LastGateRead):
            decoder(input_ids=token_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        return torch.stack([margins[index] for index in range(self.num_layers)]).view(
            self.num_layers, *token_ids_BT.shape
        )

    @functools.cached_property
    def needs_mask(self) -> bool:
        """False where every token attends to earlier ones alone: padding on the right is then seen
        by no real token."""
        return any(
            getattr(module, "is_causal", True) is False for module in self.layers.decoder.modules()
        )

    @contextmanager
    def reading(self) -> Iterator[_Margins]:
        """Fills the dictionary that it yields with the margins of each gate, by its index, in the
        forward passes of the block: float32, in the shape of the tokens."""
        margins: _Margins = {}
        token = _read.set(margins)
        try:
            yield margins
        finally:
            _read.reset(token)

    def _attach(self, index: int, feed_forward: nn.Module) -> Any:  # noqa: ANN401 (torch's handle)
        hook = functools.partial(self._read_input, index)
        return feed_forward.register_forward_pre_hook(hook, with_kwargs=True)

    def _read_input(
        self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        margins = _read.get()
        if margins is None:
            return
        hidden = module_input(args, kwargs)
        # float32: in bfloat16 two rows whose margins differ by 1 % would often get the same one.
        weights_1H, bias_1 = self._weights_LH[index : index + 1], self._biases_L[index : index + 1]
        margins[index] = functional.linear(hidden.float(), weights_1H, bias_1).squeeze(-1)


def attach_gates(model: nn.Module, gates: GateSet) -> AttachedGates:
    """The gates on the layers of a causal language model of transformers, with its head or without.

    The model computes what it did before, to the bit. Raises ModelError, with what was found, where
    it has no such layers, or another number or size of them than the gates were made for.
    """
    layers = decoder_layers(model)
    config = gates.config
    counts = (
        ("num_hidden_layers", config.num_hidden_layers, len(layers)),
        ("hidden_size", config.hidden_size, layers.hidden_size),
    )
    for name, ours, theirs in counts:
        if ours != theirs:
            raise ModelError(
                f"gates for another base: {name} is {ours} of {config.base_name}, and {theirs} of "
                f"this {type(model).__name__}"
            )
    return AttachedGates(model, layers, gates)


class _LastGateRead(Exception):
    """The last gate has read its input: the rest of the forward pass is not needed."""


class _LastGate(nn.Module):
    """Takes the place of the last gated layer's feed-forward module, and ends the forward pass."""

    def forward(self, *_: Any, **__: Any) -> Tensor:  # noqa: ANN401
        raise _LastGateRead
