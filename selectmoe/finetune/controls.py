"""Control samples that need the stored scores of a selection: as long, or matched to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.corpus.shards import read_rows
from selectmoe.errors import DataError
from selectmoe.records import RejectedRow, Sample
from selectmoe.selection.blocks import score_blocks
from selectmoe.selection.finished_rule import rule_of_run, scored_folder
from selectmoe.selection.keep_rule import Fate, KeepRule
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.sampling_keys import gumbel_noise, natural_log
from selectmoe.training.tokenized_rows import ChosenRows

# Shape letters: N = scored rows of the run.

TOLERANCE = 0.01  # of the answer tokens of the selection
MOST_TILT = 64.0
NUM_BISECTIONS = 48
NUM_DRAWS = 16  # with other noise, where the first draws miss the tolerance


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPool:
    """The scored rows of a run, in the order of their keys."""

    folder: RunFolder  # of the run that has scored
    shards: np.ndarray  # int64 (N,), number of the shard
    row_numbers: np.ndarray  # int64 (N,), in the shard
    datasets: np.ndarray  # int64 (N,), number of the dataset
    answer_tokens: np.ndarray  # int64 (N,)
    key_hashes: np.ndarray  # uint64 (N, 2)
    selected: np.ndarray  # bool (N,)

    def rows(self, chosen: np.ndarray, description: str) -> ChosenRows:
        """chosen: bool (N,)."""
        names = [shard.name for shard in self.folder.scored_shards()]

        def read() -> Iterator[Sample | RejectedRow]:
            for number in np.unique(self.shards[chosen]).tolist():
                wanted = self.row_numbers[chosen & (self.shards == number)]
                yield from read_rows(self.folder.corpus / names[number], wanted)

        return ChosenRows(read, int(chosen.sum()), description)


def longest_rows(run: Path) -> ChosenRows:
    """As many rows as were selected, those with the most answer tokens; ties by row key."""
    pool = read_pool(run)
    num_rows = int(pool.selected.sum())
    order = np.lexsort((pool.key_hashes[:, 1], pool.key_hashes[:, 0], -pool.answer_tokens))
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[:num_rows]] = True
    description = f"the {num_rows:,} of {len(order):,} scored rows with the longest answers"
    return pool.rows(chosen, description)


def matched_rows(run: Path, *, seed: int) -> ChosenRows:
    """Random scored rows: as many of each dataset as were selected, with as many answer tokens in
    all, to 1 %. Raises DataError where no draw comes as near."""
    pool = read_pool(run)
    wanted = int(pool.answer_tokens[pool.selected].sum())
    chosen = draw_matched(pool, seed=seed)
    tokens, num_rows = int(pool.answer_tokens[chosen].sum()), int(chosen.sum())
    if abs(tokens - wanted) > TOLERANCE * wanted:
        raise DataError(
            f"{run}: dataset.mode=random_matched needs {num_rows:,} random rows with "
            f"{wanted:,} answer tokens to {100 * TOLERANCE:g} %, as the selection has by dataset; "
            f"the nearest draw has {tokens:,}"
        )
    num_both = int((chosen & pool.selected).sum())
    return pool.rows(
        chosen,
        f"{num_rows:,} of {len(chosen):,} scored rows at random, matched to the selection by "
        f"dataset and answer tokens ({tokens:,}, the selection has {wanted:,}); {num_both:,} of "
        "them are selected rows",
    )


def draw_matched(pool: ScoredPool, *, seed: int) -> np.ndarray:
    """bool (N,): the draw whose answer tokens are nearest to those of the selection.

    A uniform draw where its tokens match. Else long or short rows are preferred, no more than
    needed: the noise of a row is tilted by its standardized log length, and a bisection finds the
    tilt, with which the tokens of the draw grow.
    """
    wanted = int(pool.answer_tokens[pool.selected].sum())
    logs = natural_log(np.maximum(pool.answer_tokens, 1).astype(np.float64))
    lengths = (logs - logs.mean()) / max(float(logs.std()), 1e-9)
    best: np.ndarray | None = None
    nearest = float("inf")
    for number in range(NUM_DRAWS):
        noise = gumbel_noise(pool.key_hashes, seed=(seed + (number << 32)) % 2**63)
        low, high, tilt = -MOST_TILT, MOST_TILT, 0.0
        for _ in range(NUM_BISECTIONS):
            chosen = _first_of_each_dataset(pool, noise + tilt * lengths)
            missing = wanted - int(pool.answer_tokens[chosen].sum())
            if abs(missing) < nearest:
                best, nearest = chosen, abs(missing)
            if nearest <= TOLERANCE * wanted:
                return chosen
            low, high = (tilt, high) if missing > 0 else (low, tilt)
            tilt = (low + high) / 2
    assert best is not None
    return best


def _first_of_each_dataset(pool: ScoredPool, keys: np.ndarray) -> np.ndarray:
    """bool (N,): of each dataset as many rows as are selected, those with the highest keys."""
    chosen = np.zeros(len(keys), dtype=bool)
    numbers, counts = np.unique(pool.datasets[pool.selected], return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        rows = np.flatnonzero(pool.datasets == number)
        chosen[rows[np.argsort(-keys[rows], kind="stable")[:count]]] = True
    return chosen


def read_pool(run: Path, *, map_items: MapItems = map_in_threads) -> ScoredPool:
    """Raises DataError where the run has no scores, or other rows than its manifest says."""
    output = RunFolder(run)
    manifest = output.read_manifest()
    folder = scored_folder(output, manifest) if "config" in manifest else output
    shards = folder.scored_shards()
    if "thresholds" not in manifest or not shards or not folder.corpus_shards():
        raise DataError(
            f"{run}: dataset.mode=longest and random_matched need the manifest of the selection, "
            "and the folders corpus and scored of its run"
        )
    rule = rule_of_run(manifest, folder, map_items)
    parts = list(map_items(partial(_read_shard, rule), list(enumerate(shards))))
    columns = [np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)]
    names = np.concatenate([part[0] for part in parts])
    num_selected = manifest["total"]["num_selected"]
    pool = ScoredPool(folder, columns[0], columns[1], _numbers(names), *columns[2:])
    if pool.selected.sum() != num_selected:
        raise DataError(
            f"{run}: the scores no longer belong to the selection: by them "
            f"{int(pool.selected.sum()):,} rows are kept, and its manifest has {num_selected:,}"
        )
    return pool


def _read_shard(rule: KeepRule, numbered: tuple[int, Path]) -> tuple[np.ndarray, ...]:
    """Datasets, and the columns of a pool without them."""
    number, shard = numbered
    columns = tuple({*rule.columns, "dataset", "num_answer_tokens"})
    parts = [
        (
            _dataset_names(block.rows_by_dataset(), len(block.scores)),
            np.full(len(block.scores), number),
            block.row_numbers,
            block.numbers("num_answer_tokens").astype(np.int64),
            block.key_hashes,
            rule.fates(block) == Fate.KEPT,
        )
        for block in score_blocks(shard, columns)
    ]
    empty = (
        np.empty(0, object),
        np.empty(0, np.int64),
        np.empty(0, np.int64),
        np.empty(0, np.int64),
        np.empty((0, 2), np.uint64),
        np.empty(0, bool),
    )
    return tuple(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))


def _dataset_names(
    rows_by_dataset: Iterator[tuple[str, np.ndarray | slice]], num_rows: int
) -> np.ndarray:
    """object (N,): the dataset of each row of a block; equal names are one object."""
    names = np.empty(num_rows, dtype=object)
    for name, rows in rows_by_dataset:
        names[rows] = name
    return names


def _numbers(names: np.ndarray) -> np.ndarray:
    """int64 (N,): a number for each name, in the order of their first rows."""
    found: dict[str, int] = {}
    return np.array([found.setdefault(name, len(found)) for name in names], dtype=np.int64)
