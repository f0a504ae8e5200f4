"""Rows of the recipes and benchmarks: how they are read, and which are held out for evaluation."""

import zlib
from collections.abc import Sequence

from selectmoe.data.readers import read_corpora
from selectmoe.records import Sample


def read_samples(corpora: Sequence[str]) -> list[Sample]:
    """All valid rows of the corpora; invalid ones are skipped."""
    return [row for row in read_corpora(corpora) if isinstance(row, Sample)]


def messages_of(sample: Sample) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in sample.messages]


def is_held_out(sample_id: str) -> bool:
    """True for the same tenth of the rows in every recipe; CRC-32, not hash(), which is salted."""
    return zlib.crc32(sample_id.encode()) % 10 == 0


def is_test_row(sample_id: str) -> bool:
    """True for half of the held-out tenth: the test set. The other half is for validation."""
    return zlib.crc32(sample_id.encode()) % 20 == 10
