"""A target that has conversations to learn: the tiny language model after a few pages of books.

The one that ships was made from the very rows of the pool, and stage 3 on 125 of them does not
lower its loss on held-out answers (3.963 before, 3.969 after). Two hundred paragraphs take it
away from conversations (4.340), and 125 rows at random then bring it back a good part of the way
(4.092), worse copies of the same rows less (4.160).
"""

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.quality_worth import WorthSettings, finetuned
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import DataError
from selectmoe.evaluation.target_model import load_target
from selectmoe.model.quiet_loading import quiet_transformers
from selectmoe.records import Message, Sample

NUM_CHARACTERS = 3_000_000  # that paragraphs are drawn from
MIN_CHARACTERS = 400
FAR_AWAY = ("preset=tiny", "training.num_epochs=1", "training.learning_rate=1e-2")
SEED = 0


def read_paragraphs(path: Path, *, num_paragraphs: int) -> list[str]:
    """Long paragraphs of a .txt.gz, at random."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        paragraphs = file.read(NUM_CHARACTERS).split("\n\n")
    long = [paragraph for paragraph in paragraphs if len(paragraph) > MIN_CHARACTERS]
    if len(long) < num_paragraphs:
        raise DataError(
            f"{path} must have {num_paragraphs} paragraphs of more than {MIN_CHARACTERS} "
            f"characters, has {len(long)}"
        )
    return Random(SEED).sample(long, num_paragraphs)


def plain_text_target(texts: Sequence[str], settings: WorthSettings, folder: Path) -> Path:
    """Writes the target into `folder`; its path is a `WorthSettings.model`."""
    rows = [
        Sample("text", str(number), (Message("assistant", text),))
        for number, text in enumerate(texts)
    ]
    adapter = finetuned(rows, SEED, replace(settings, overrides=FAR_AWAY), folder)
    adapted, tokenizer = load_target(
        EvaluateConfig(model=settings.model, adapter=adapter), device="cpu"
    )
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]  # a PeftModel by the adapter
    with quiet_transformers():
        merged.save_pretrained(folder / "target")
        tokenizer.save_pretrained(folder / "target")
    return folder / "target"
