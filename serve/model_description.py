"""The description of the served model that a scorer reports to the ingress replicas."""

from dataclasses import dataclass

from selectmoe.config.engine import Length, Turns
from selectmoe.scoring.calibration import Calibration


@dataclass(frozen=True, slots=True, eq=False)
class ModelDescription:
    """Reported by a scorer once it is warm; equal for all scorers of a deployment."""

    model: str
    revision: str | None
    weights_hash: str
    formula: str
    length: Length  # raw where the calibration has no adjustment, whatever the setting
    turns: Turns
    device: str
    dtype: str
    num_layers: int
    max_sequence_length: int  # the setting, or the model's limit if it is lower
    max_tokens_per_batch: int
    is_packed: bool  # batches are packed (variable length) without padding, as on a GPU
    calibration: Calibration | None
