"""weights.json: weights of standardized signals, as `jobs/fit_weights.py` fits them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectmoe.data.writers import write_json


@dataclass(frozen=True, slots=True)
class SignalWeight:
    """A row's value is the sum over signals of weight * (signal - mean) / deviation."""

    weight: float
    mean: float
    deviation: float


def save_weights(path: Path, weights: Mapping[str, SignalWeight], about: Mapping[str, Any]) -> None:
    """about: where the weights come from, for people."""
    signals = {name: asdict(weight) for name, weight in weights.items()}
    write_json(path, {"signals": signals, **about})
