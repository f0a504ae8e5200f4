"""Which corpus a stage reads, and how much of it."""

from dataclasses import dataclass

from selectmoe.config.checks import require, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Which corpora are read, and how much of them."""

    paths: tuple[str, ...] = ()
    """Corpora: files, folders, globs, URLs or hub:NAME[:split]; several are separated by commas.
    [] is the demo corpus."""
    subset_ratio: float = 1.0
    """Fraction of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Maximum tokens per sample; longer samples are truncated."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
        require_at_least(1, self, "max_sequence_length", group="dataset.")
