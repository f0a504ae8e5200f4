"""Datasets of bench_quality.py: held-out rows, corrupted copies, rated answers, a pool."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.unseen_corruptions import UNSEEN_CORRUPTIONS
from recipes.held_out_auroc import Copies, copies_by_kind
from recipes.held_out_rows import is_held_out, is_test_row, read_samples
from selectmoe.errors import DataError
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Message, Sample

FAMILIES = ("cot", "dolly", "flan_v2", "oasst1")
POOL_FAMILIES = ("dolly", "oasst1")
PAIRS_FILE = "quality/pairs_pandalm_human.jsonl"
RATED_FILE = "quality/quality_dolly_alpagasus_chatgpt.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class RatedRows:
    """Samples that people, or a model, labeled better (1) or worse (0)."""

    samples: list[Sample]
    labels: np.ndarray  # bool
    pair_ids: list[str]  # equal for the two answers to a question; empty if not rated in pairs


@dataclass(frozen=True, slots=True, eq=False)
class QualityRows:
    """All rows that are scored, and those that may be trained on."""

    real: list[Sample]  # test set: neither trained on nor used for validation
    seen: Copies  # by the kinds of the warm-up
    unseen: Copies  # by kinds that nothing was trained on
    held_out: list[Sample]  # evaluation set of finetuned targets; contains `real`
    training: list[Sample]
    pool: list[Sample]  # to select from
    pairs: RatedRows | None
    rated: RatedRows | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Number of rows of each part."""

    num_per_family: int
    num_held_out: int  # per family, too
    num_training: int
    num_pool: int


def read_rows(data: Path | None, sizes: Sizes, *, seed: int) -> QualityRows:
    """data: a folder with instructions/ and quality/; None is the demo corpus, without ratings."""
    if data is None:
        return _demo_rows(sizes, seed=seed)
    random = Random(seed)
    test, training = split_families(data / "instructions")
    held_out = {
        family: sample_rows(test[family], sizes.num_held_out, random) for family in FAMILIES
    }
    real = [row for family in FAMILIES for row in held_out[family][: sizes.num_per_family]]
    all_training = [row for family in FAMILIES for row in training[family]]
    pool = [row for family in POOL_FAMILIES for row in training[family]]
    return QualityRows(
        real=real,
        seen=copies_by_kind(real),
        unseen=copies_by_kind(real, UNSEEN_CORRUPTIONS),
        held_out=[row for family in FAMILIES for row in held_out[family]],
        training=sample_rows(all_training, sizes.num_training, random),
        pool=sample_rows(pool, sizes.num_pool, random),
        pairs=read_ratings(data / PAIRS_FILE),
        rated=read_ratings(data / RATED_FILE),
    )


def split_families(folder: Path) -> tuple[dict[str, list[Sample]], dict[str, list[Sample]]]:
    """The test and training rows of each family."""
    test: dict[str, list[Sample]] = {family: [] for family in FAMILIES}
    training: dict[str, list[Sample]] = {family: [] for family in FAMILIES}
    for row in read_samples([str(folder)]):
        if row.dataset in test and is_test_row(row.sample_id):
            test[row.dataset].append(row)
        elif row.dataset in test and not is_held_out(row.sample_id):
            training[row.dataset].append(row)
    missing = [family for family in FAMILIES if not test[family]]
    if missing:
        raise DataError(f"{folder} must have rows of the dataset {missing[0]}, has none")
    return test, training


def _demo_rows(sizes: Sizes, *, seed: int) -> QualityRows:
    """One part of the demo corpus, on which nothing was trained, for testing, one for training."""
    clean = [row for row in read_samples([str(DEMO_CORPUS)]) if row.dataset == "demo"]
    Random(seed).shuffle(clean)
    real, training = clean[: sizes.num_per_family], clean[sizes.num_per_family :]
    return QualityRows(
        real=real,
        seen=copies_by_kind(real),
        unseen=copies_by_kind(real, UNSEEN_CORRUPTIONS),
        held_out=real,
        training=training[: sizes.num_training],
        pool=training[: sizes.num_pool],
        pairs=None,
        rated=None,
    )


def read_ratings(path: Path) -> RatedRows | None:
    """None, with a warning, if the file is missing."""
    if not path.is_file():
        logger.warning("%s is missing: its column of the table stays empty", path.name)
        return None
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    samples = [
        Sample(
            dataset=path.stem,
            sample_id=row["id"],
            messages=tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]),
        )
        for row in rows
    ]
    labels = np.array([row["label"] == 1 for row in rows])
    pair_ids = [row["pair_id"] for row in rows if "pair_id" in row]
    return RatedRows(samples, labels, pair_ids)


def sample_rows(samples: Sequence[Sample], num_rows: int, random: Random) -> list[Sample]:
    return random.sample(list(samples), min(num_rows, len(samples)))
