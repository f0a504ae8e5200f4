"""A pass over the scores of a run: histograms of kept and dropped rows, and which rows to show.

Memory depends on the number of bins and examples, not on the number of rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from selectmoe.selection.blocks import ScoreBlock, rows_by_scope, score_blocks
from selectmoe.selection.keep_rule import Fate, KeepRule, ThresholdRule
from selectmoe.selection.orders import ByScore
from selectmoe.selection.passes import Thresholds

# Shape letters: N = rows of a block, B = bins of scores.

EXAMPLES_PER_GROUP = 10
NUM_LENGTH_BINS = 18  # of powers of two: 1, 2, 3 to 4, 5 to 8, …, more than 65,536 answer tokens
COLUMNS = ("score", "dataset", "num_answer_tokens")


@dataclass(frozen=True, slots=True)
class FoundRow:
    """Where a row lies, and its score."""

    shard: str
    row: int  # position in the shard
    score: float
    margin: float  # score minus the threshold of its dataset or of the corpus; else -inf


@dataclass(frozen=True, slots=True, eq=False)
class ScoreSurvey:
    """What the pass finds. Kept rows are counted under 1, the others under 0."""

    scores: np.ndarray  # int64 (2, B)
    answer_tokens: np.ndarray  # int64 (2, NUM_LENGTH_BINS)
    examples: dict[str, list[FoundRow]] = field(default_factory=dict)  # by a name in ORDERS

    @classmethod
    def total(cls, parts: Iterable["ScoreSurvey"], *, num_bins: int) -> "ScoreSurvey":
        whole = cls(np.zeros((2, num_bins), np.int64), np.zeros((2, NUM_LENGTH_BINS), np.int64))
        for part in parts:
            np.add(whole.scores, part.scores, out=whole.scores)
            np.add(whole.answer_tokens, part.answer_tokens, out=whole.answer_tokens)
            for name, rows in part.examples.items():
                both = sorted([*whole.examples.get(name, []), *rows], key=ORDERS[name])
                whole.examples[name] = both[:EXAMPLES_PER_GROUP]
        return whole


# The order of shards and rows is that of row keys: ties are broken as in the selection, and the
# first kept rows are a random choice of them.
ORDERS: dict[str, Callable[[FoundRow], tuple[float | str, ...]]] = {
    "best": lambda row: (-row.score, row.shard, row.row),
    "last_kept": lambda row: (row.margin, row.shard, row.row),
    "first_dropped": lambda row: (-row.margin, row.shard, row.row),
    "worst": lambda row: (row.score, row.shard, row.row),
    "random_kept": lambda row: (row.shard, row.row),
}


def survey_scores(rule: KeepRule, edges: np.ndarray, shards: Sequence[Path]) -> ScoreSurvey:
    """The pass. edges: float64 (B + 1,); scores outside them count in the first or last bin."""
    blocks = (
        _survey_block(block, shard.name, rule, edges)
        for shard in shards
        for block in score_blocks(shard, tuple({*COLUMNS, *rule.columns}))
        if len(block.scores)
    )
    return ScoreSurvey.total(blocks, num_bins=len(edges) - 1)


def score_thresholds(rule: KeepRule) -> Thresholds:
    """The thresholds of a rule that orders rows by score; none of another one."""
    if isinstance(rule, ThresholdRule) and isinstance(rule.order, ByScore):
        return rule.thresholds
    return {}


def kept_and_margins(block: ScoreBlock, rule: KeepRule) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a block, whether it is kept, bool (N,), and its margin, float64 (N,)."""
    margins = np.full(len(block.scores), -np.inf)
    thresholds = score_thresholds(rule)
    for name, rows in rows_by_scope(block, thresholds):
        margins[rows] = block.scores[rows] - np.float64(thresholds[name].score)
    return rule.fates(block) == Fate.KEPT, margins


def length_bin_names() -> list[str]:
    """1, 2, 3 to 4, …: the labels of the bins of answer tokens."""
    names = ["1", "2"]
    names += [f"{2 ** (n - 1) + 1:,} to {2**n:,}" for n in range(2, NUM_LENGTH_BINS - 1)]
    return [*names, f">{2 ** (NUM_LENGTH_BINS - 2):,}"]


def length_bins(num_tokens: np.ndarray) -> np.ndarray:
    """int64 (N,): the bin of each number of answer tokens."""
    bins = np.ceil(np.log2(np.maximum(num_tokens, 1))).astype(np.int64)
    limited: np.ndarray = np.minimum(bins, NUM_LENGTH_BINS - 1)
    return limited


def _survey_block(block: ScoreBlock, shard: str, rule: KeepRule, edges: np.ndarray) -> ScoreSurvey:
    kept, margins = kept_and_margins(block, rule)
    num_bins = len(edges) - 1
    bins = np.clip(np.searchsorted(edges, block.scores, side="right") - 1, 0, num_bins - 1)
    lengths = length_bins(block.numbers("num_answer_tokens"))
    examples = {
        "best": _lowest(-block.scores, np.ones_like(kept)),
        "last_kept": _lowest(margins, kept),
        "first_dropped": _lowest(-margins, ~kept),
        "worst": _lowest(block.scores, np.ones_like(kept)),
        "random_kept": np.flatnonzero(kept)[:EXAMPLES_PER_GROUP],
    }
    if not score_thresholds(rule):
        examples["last_kept"] = examples["first_dropped"] = np.empty(0, np.int64)
    return ScoreSurvey(
        _counts_by_side(bins, kept, num_bins),
        _counts_by_side(lengths, kept, NUM_LENGTH_BINS),
        {
            name: [_found_row(block, shard, margins, position) for position in positions.tolist()]
            for name, positions in examples.items()
        },
    )


def _counts_by_side(bins: np.ndarray, kept: np.ndarray, num_bins: int) -> np.ndarray:
    """int64 (2, B): dropped rows by bin, then kept ones."""
    return np.stack([np.bincount(bins[side], minlength=num_bins) for side in (~kept, kept)])


def _found_row(block: ScoreBlock, shard: str, margins: np.ndarray, position: int) -> FoundRow:
    row = int(block.row_numbers[position])
    return FoundRow(shard, row, float(block.scores[position]), float(margins[position]))


def _lowest(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of the wanted rows with the lowest values, at most EXAMPLES_PER_GROUP."""
    positions = np.flatnonzero(wanted)
    if len(positions) > EXAMPLES_PER_GROUP:
        chosen = values[positions]
        last = np.partition(chosen, EXAMPLES_PER_GROUP - 1)[EXAMPLES_PER_GROUP - 1]
        positions = positions[chosen <= last]
    return positions[np.argsort(values[positions], kind="stable")][:EXAMPLES_PER_GROUP]
