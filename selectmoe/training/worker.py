"""What a training worker of stage 1 or 3 knows: folders, rank and device; imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWorker:
    """Where a worker reads and writes, on which device, and beside how many others."""

    output: Path
    """Folder of the run: tokenized rows, metrics, results."""
    scratch: Path
    """Folder of this worker alone, for the checkpoints that Trainer writes."""
    rank: int = 0
    num_workers: int = 1
    num_sharing: int = 1
    """Workers on this machine, which share its memory where they have no GPU."""
    uses_gpu: bool = False
    resume_from: str | None = None
    """Folder of the checkpoint to resume from."""
    callbacks: "tuple[TrainerCallback, ...]" = ()
    """Added to those of the stage, behind them: they find each checkpoint complete."""

    @property
    def device(self) -> str:
        return "cuda" if self.uses_gpu else "cpu"

    def computes_in(self, dtype: str | None) -> dict[str, str]:
        """Device and effective dtype, for the manifest. dtype: the setting; None is the default."""
        effective = dtype or ("bfloat16" if self.uses_gpu else "float32")
        return {"device": self.device, "dtype": effective}
