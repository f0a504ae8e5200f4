"""The settings that all stages share: output folder, resumption, share of rejected rows."""

from dataclasses import dataclass
from typing import ClassVar

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run is written."""

    stage: ClassVar[str]

    output: str | None = None
    """Output folder of this run; null is <output_root>/<stage>/<date>/<time>."""
    output_root: str | None = None
    """Parent folder of all runs; null is $SELECTMOE_OUTPUT_ROOT, else ./outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumableRunConfig(RunConfig):
    """A run that reads rows, and that can be resumed."""

    resume: str | None = None
    """Output folder of an interrupted run to resume."""
    max_rejected: float = 0.01
    """Maximum fraction of rejected rows, in [0, 1]; the run fails above it."""

    def __post_init__(self) -> None:
        require(0 <= self.max_rejected <= 1, "max_rejected", "in [0, 1]", self.max_rejected)
