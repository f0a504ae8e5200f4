"""Random gates for a base, as a warm-up would save them."""

from pathlib import Path

import torch

from selectmoe.model.attached_gates import GateSet, save_gates
from selectmoe.model.base_weights import hash_base
from selectmoe.model.checkpoint import read_model_config
from selectmoe.model.gates_config import BaseShape, GatesConfig


def gates_for(model, *, layers=(1, 2), base="tiny", base_sha256="0" * 64, **settings) -> GateSet:
    """For a model in memory."""
    config = GatesConfig(
        **{
            "base": base,
            "base_sha256": base_sha256,
            "model_type": model.config.model_type,
            "hidden_size": model.config.hidden_size,
            "num_hidden_layers": model.config.num_hidden_layers,
            "layers": tuple(layers),
            **settings,
        }
    )
    return random_gates(config)


def random_gates(config: GatesConfig) -> GateSet:
    generator = torch.Generator().manual_seed(1)
    num_gates = len(config.layers)
    weights = torch.randn(num_gates, 2, config.hidden_size, generator=generator) / 8
    return GateSet(config, weights, torch.randn(num_gates, 2, generator=generator) / 8)


def save_selector(folder: Path, base: Path, /, *, layers=(1, 2), **settings) -> Path:
    """A selector folder with random gates for the base of a folder."""
    shape = BaseShape.from_settings(read_model_config(str(base)))
    config = GatesConfig(
        **{
            "base": str(base),
            "base_sha256": hash_base(base),
            "model_type": shape.model_type,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "layers": tuple(layers),
            **settings,
        }
    )
    save_gates(folder, random_gates(config))
    return folder
