"""Rows of bench_gate_kinds.py: originals, corrupted copies, rated answers and short replies."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from benchmarks.quality_rows import FAMILIES, PAIRS_FILE, POOL_FAMILIES, RATED_FILE, sample_rows
from benchmarks.unseen_corruptions import UNSEEN_CORRUPTIONS
from recipes.held_out_auroc import NUM_DONORS
from recipes.held_out_rows import is_held_out, is_test_row, read_samples
from selectmoe.corruptions.kinds import CORRUPTIONS, Corruption, corrupt
from selectmoe.errors import DataError
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Message, Sample

SEED = 1  # of every draw of rows and donors
TRAINING, VALIDATION, TEST, SHORT, CALIBRATION = (
    "training", "validation", "test", "short", "calibration",
)  # fmt: skip
RATED = "rated"
PAIR_FILES = {
    "pairs": PAIRS_FILE,
    "revisions": "preferences/revisions_coachlm_human.jsonl",
    "arguments": "preferences/arguments_ukp_human.jsonl.gz",
}
SHORT_REPLIES = ("!", "!!", "yes", ".", "%", "2", ")", "N/A")
MIN_WORDS_OF_ANSWER = 8  # of an answer in whose place a short reply is put
# Seeds of the copies; the warm-up of the gates draws others.
COPY_SEEDS = {TRAINING: 7, VALIDATION: 1, TEST: 1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One row that is scored, and what it is for."""

    part: str
    sample: Sample
    kind: str = ""  # of a copy, or the reply that replaces an answer; "" is an original
    original: int = -1  # number of the original in its part
    pair_id: str = ""
    is_better: bool = False  # of a pair, or of the rated rows
    is_for_choosing: bool = False  # of a pair: half A, by which mixes are chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Number of rows of each part; "per family" is per dataset."""

    num_training_per_family: int = 560
    num_training: int = 2_100
    num_validation_per_family: int = 50
    num_test_per_family: int = 100
    num_short: int = 150
    num_argument_pairs: int = 2_500
    num_calibration_per_family: int = 1_500


Families = Mapping[str, list[Sample]]


def draw_rows(data: Path | None, extent: Extent) -> list[Row]:
    """All rows, in the same order each time.

    data: a folder with instructions/, quality/ and preferences/; None is the demo corpus, which has
    no ratings.
    """
    random = Random(SEED)
    families = read_families(data)
    training, validation, test = split(families)
    chosen = take(training, extent.num_training_per_family, random)
    random.shuffle(chosen)
    chosen = chosen[: extent.num_training]
    rows = with_copies(
        TRAINING, chosen, [row for part in training.values() for row in part], random
    )
    for part, held_out, size in (
        (VALIDATION, validation, extent.num_validation_per_family),
        (TEST, test, extent.num_test_per_family),
    ):
        real = take(held_out, size, random)
        rows += with_copies(part, real, real, random)
        rows += copies_of(part, real, real, UNSEEN_CORRUPTIONS, random)
    rows += short_replies(test, validation, extent.num_short, random)
    if data is not None:
        rows += rated_rows(data, extent.num_argument_pairs, random)
    used = {sample.sample_id for sample in chosen}
    unused = {
        name: [row for row in part if row.sample_id not in used] for name, part in training.items()
    }
    calibration = take(unused, extent.num_calibration_per_family, random)
    return rows + [Row(CALIBRATION, sample) for sample in calibration]


def read_families(data: Path | None) -> Families:
    """The rows of each dataset. Raises DataError where one is missing."""
    corpus, names = (data / "instructions", FAMILIES) if data else (DEMO_CORPUS, ("demo",))
    families: dict[str, list[Sample]] = {name: [] for name in names}
    for row in read_samples([str(corpus)]):
        if row.dataset in families:
            families[row.dataset].append(row)
    for name, samples in families.items():
        if not samples:
            raise DataError(f"{corpus} must have rows of the dataset {name}, has none")
    return families


def split(families: Families) -> tuple[Families, Families, Families]:
    """Training, validation and test rows of each family."""
    parts: tuple[dict[str, list[Sample]], ...] = ({}, {}, {})
    for name, samples in families.items():
        for part in parts:
            part[name] = []
        for row in samples:
            held_out = 1 + is_test_row(row.sample_id) if is_held_out(row.sample_id) else 0
            parts[held_out][name].append(row)
    training, validation, test = parts
    return training, validation, test


def take(families: Families, num_per_family: int, random: Random) -> list[Sample]:
    return [row for rows in families.values() for row in sample_rows(rows, num_per_family, random)]


def with_copies(
    part: str, samples: Sequence[Sample], donors: Sequence[Sample], random: Random
) -> list[Row]:
    """The originals, and their copies of the kinds that a warm-up trains on."""
    originals = [Row(part, sample, original=number) for number, sample in enumerate(samples)]
    return originals + copies_of(part, samples, donors, CORRUPTIONS, random)


def copies_of(
    part: str,
    samples: Sequence[Sample],
    donors: Sequence[Sample],
    kinds: Mapping[str, Corruption],
    random: Random,
) -> list[Row]:
    rows = []
    for number, sample in enumerate(samples):
        for kind in kinds:
            some = random.sample(donors, min(NUM_DONORS, len(donors)))
            copy = corrupt(sample, kind=kind, seed=COPY_SEEDS[part], donors=some, kinds=kinds)
            if copy is not None:
                rows.append(Row(part, copy, kind=kind, original=number))
    return rows


def short_replies(
    test: Families, validation: Families, num_samples: int, random: Random
) -> list[Row]:
    """Single exchanges with a real answer, and with each of SHORT_REPLIES in its place."""
    names = [name for name in POOL_FAMILIES if name in test] or list(test)
    single = [
        row
        for name in names
        for row in [*test[name], *validation[name]]
        if len(row.messages) == 2 and len(row.messages[1].content.split()) >= MIN_WORDS_OF_ANSWER
    ]
    rows = []
    for number, sample in enumerate(sample_rows(single, num_samples, random)):
        rows.append(Row(SHORT, sample, original=number))
        for reply in SHORT_REPLIES:
            messages = (sample.messages[0], Message("assistant", reply))
            answered = replace(sample, messages=messages)
            rows.append(Row(SHORT, answered, kind=reply, original=number))
    return rows


def rated_rows(data: Path, num_argument_pairs: int, random: Random) -> Iterator[Row]:
    """Rows of the files that exist; a warning for each of the others."""
    files = {"pairs": PAIR_FILES["pairs"], RATED: RATED_FILE, **PAIR_FILES}
    for part, name in files.items():
        if not (data / name).is_file():
            logger.warning("%s is missing: its metrics stay empty", name)
            continue
        rows = list(_read_rated(part, data / name))
        if part == "arguments":
            pair_ids = sorted({row.pair_id for row in rows})
            kept = set(random.sample(pair_ids, min(num_argument_pairs, len(pair_ids))))
            rows = [row for row in rows if row.pair_id in kept]
        yield from rows


def _read_rated(part: str, path: Path) -> Iterator[Row]:
    """Half A of pairs is the file's split "train", without one those with an even CRC-32."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for line in text.decode("utf-8").splitlines():
        fields = json.loads(line)
        pair_id, file_split = fields.get("pair_id", ""), fields.get("split")
        messages = tuple(Message(turn["role"], turn["content"]) for turn in fields["messages"])
        yield Row(
            part=part,
            sample=Sample(part, fields["id"], messages),
            pair_id=pair_id,
            is_better=fields["label"] == 1,
            is_for_choosing=(
                file_split == "train" if file_split else zlib.crc32(pair_id.encode()) % 2 == 0
            ),
        )
