"""Samples and rejected rows for tests of the corpus: made, small and each its own."""

import random
from pathlib import Path

from selectmoe.corpus.shards import read_shard
from selectmoe.records import Message, RejectedRow, Sample


def sample_of(
    name: str, *, content: str = "Because.", dataset: str = "d", source: str = ""
) -> Sample:
    return Sample(dataset, name, (Message("user", "Why?"), Message("assistant", content)), source)


def samples(number: int) -> list[Sample]:
    """Turns, lengths and scripts differ; every id is its own."""
    rng = random.Random(0)
    made = []
    for n in range(number):
        turns = [
            message
            for _ in range(rng.randint(1, 3))
            for message in (
                Message("user", "日本 " * rng.randint(0, 5)),
                Message("assistant", f"{n} " * rng.randint(1, 40)),
            )
        ]
        made.append(Sample(f"d{n % 3}", f"id-{n}", tuple(turns), f"f:{n}"))
    return made


def rejected_rows(number: int) -> list[RejectedRow]:
    return [
        RejectedRow("f", n, "d", f"id-{n}", "why", f"because {n}") for n in range(1, number + 1)
    ]


def shard_rows(folder: Path) -> list[tuple[str, Sample]]:
    return [row for path in sorted(folder.glob("shard-*")) for row in read_shard(path)]
