"""What an ingress has to know of the model that the scorers hold."""

from dataclasses import dataclass

from selectmoe.scoring.calibration import Calibration


@dataclass(frozen=True, slots=True, eq=False)
class ModelDescription:
    """Told by a scorer once it is warm; the same for all of one deployment."""

    model: str
    revision: str | None
    weights_hash: str
    formula: str
    device: str
    dtype: str
    num_layers: int
    max_sequence_length: int  # the setting's, or the model's where it is less
    max_batch_tokens: int
    rows_end_to_end: bool  # without padding, as on a GPU
    calibration: Calibration | None
