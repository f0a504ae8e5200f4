"""Why a training run refuses to go on."""

from selectmoe.errors import SelectMoeError


class TrainingStoppedError(SelectMoeError, RuntimeError):
    """Training cannot lead anywhere; raised on all workers in the same step."""
