"""Which corpus a stage reads, and how much of it."""

from dataclasses import dataclass

from selectmoe.config.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """What is read, and how much of it."""

    paths: tuple[str, ...] = ()
    """Corpora, separated by commas: files, folders, globs, URLs or hub:NAME[:split]; [] is the demo
    corpus."""
    subset_ratio: float = 1.0
    """Share of the rows to use, in (0, 1], chosen by a hash of their content."""
    max_sequence_length: int = 1_024
    """Tokens of a sample that are read; of a longer one, the first so many."""

    def __post_init__(self) -> None:
        require(0 < self.subset_ratio <= 1, "dataset.subset_ratio", "in (0, 1]", self.subset_ratio)
        length = self.max_sequence_length
        require(length >= 1, "dataset.max_sequence_length", "at least 1", length)
