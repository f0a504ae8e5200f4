"""Which corpus a stage reads, and how much of it."""

from dataclasses import dataclass

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Which corpora are read, and how much of them."""

    paths: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs or hub:NAME[:split]; several are separated by commas.
    [] is the demo corpus."""
    subset_ratio: float = 1.0
    """Fraction of the rows to use, in (0, 1], chosen by a hash of their content."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
