"""Gates on a frozen base that are trained by optimizer steps (`training.method=steps`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from selectmoe.data.writers import whole_file
from selectmoe.model.checkpoint import GATE_WEIGHTS_NAME
from selectmoe.model.decoder_layers import decoder_layers, module_input
from selectmoe.warmup.gate_fit import LinearGates
from selectmoe.warmup.gate_trainer import GateTrainer

# Shape letters: L = gates, B = rows, T = tokens, H = hidden.


class TrainableGates(nn.Module):
    """The layers of a base up to the last one with a gate, without gradient, and the gates.

    Its outputs are those that ContrastiveObjective takes from a Select-MoE.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        """The model loses the layers above the last gate, and its head.

        Gates start at zero: the loss is convex in them, so the start does not decide the end.
        """
        super().__init__()
        found = decoder_layers(model)
        del found.layers[layers[-1] + 1 :]
        self.base = found.decoder.requires_grad_(False)
        self.sharded_layers = list(found.layers)
        # By this name `is_gate` knows them.
        self.quality_gate = nn.ModuleList(nn.Linear(found.hidden_size, 2) for _ in layers)
        for parameter in self.quality_gate.parameters():
            nn.init.zeros_(parameter)
        self.num_gates = len(layers)
        self._inputs: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            found.feed_forward(layer).register_forward_pre_hook(
                self._keep_input(index), with_kwargs=True
            )

    def forward(
        self, input_ids: Tensor, *, use_cache: bool, output_quality_logits: bool
    ) -> dict[str, tuple[Tensor, ...]]:
        """Logits [B, T, 2] of every gate."""
        assert output_quality_logits
        with torch.no_grad():
            self.base(input_ids=input_ids, use_cache=use_cache)
        logits = tuple(
            gate(self._inputs[index].view(*input_ids.shape, -1).float())
            for index, gate in enumerate(self.quality_gate)
        )
        self._inputs.clear()
        return {"quality_logits": logits}

    def linear_gates(self) -> LinearGates:
        weights_L2H, biases_L2 = (
            torch.stack([getattr(gate, name).detach().cpu().double() for gate in self.quality_gate])
            for name in ("weight", "bias")
        )
        return LinearGates(
            (weights_L2H[:, 0] - weights_L2H[:, 1]).numpy(),
            (biases_L2[:, 0] - biases_L2[:, 1]).numpy(),
        )

    def _keep_input(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[index] = module_input(args, kwargs)

        return hook


class BaseGateTrainer(GateTrainer):
    """A checkpoint holds the gates alone."""

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / GATE_WEIGHTS_NAME) as file:
            file.write(save(self._gates().state_dict()))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._gates().load_state_dict(load_file(Path(resume_from_checkpoint) / GATE_WEIGHTS_NAME))

    def _gates(self) -> nn.Module:
        model: Any = self.model
        gates: nn.Module = model.quality_gate
        return gates
