"""A target model that has not learned conversations: the tiny language model, finetuned on books.

The embedded model was trained on the very rows of the pool, and stage 3 on 125 of them does not
lower its loss on held-out answers (3.963 before, 3.969 after). Two hundred paragraphs of books
raise that loss to 4.340; 125 random rows then lower it to 4.092, corrupted copies of the same rows
only to 4.160.
"""

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.quality_worth import WorthSettings, train_adapter
from selectmoe.config.evaluation import EvaluateConfig
from selectmoe.errors import DataError
from selectmoe.evaluation.target_model import load_target
from selectmoe.model.tokenizer_loading import quiet_transformers
from selectmoe.records import Message, Sample

NUM_CHARACTERS = 3_000_000  # read from the file
MIN_CHARACTERS = 400
BOOK_OVERRIDES = ("preset=tiny", "training.num_epochs=1", "training.learning_rate=1e-2")
SEED = 0


def read_paragraphs(path: Path, *, num_paragraphs: int) -> list[str]:
    """A random sample of the long paragraphs of a .txt.gz file."""
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
    """Writes the target into `folder`; returns its path, for `WorthSettings.model`."""
    rows = [
        Sample("text", str(number), (Message("assistant", text),))
        for number, text in enumerate(texts)
    ]
    adapter = train_adapter(rows, SEED, replace(settings, overrides=BOOK_OVERRIDES), folder)
    adapted, tokenizer = load_target(
        EvaluateConfig(model=settings.model, adapter=adapter), device="cpu"
    )
    merged: Any = adapted.merge_and_unload()  # type: ignore[operator]  # a PeftModel, since it has an adapter
    with quiet_transformers():
        merged.save_pretrained(folder / "target")
        tokenizer.save_pretrained(folder / "target")
    return folder / "target"
