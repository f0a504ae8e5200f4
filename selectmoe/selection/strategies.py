"""Selection strategies: from the settings and the stored scores to the rule that keeps rows.

A strategy here is an order of the rows (`orders.py`); floor, budget and limits of datasets are the
same for all of them. A strategy of another kind gives a KeepRule of its own in `choose_rows`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from selectmoe.config.rank_by import GATE
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems
from selectmoe.errors import ConfigError
from selectmoe.selection.budgets import (
    num_above_floor,
    num_asked,
    rows_within_tokens,
    scope_totals,
)
from selectmoe.selection.keep_rule import Fate, ThresholdRule
from selectmoe.selection.orders import ByAnswerTokens, BySamplingKey, ByScore, Order
from selectmoe.selection.passes import (
    Pool,
    RowCounts,
    ShardGroup,
    Survey,
    Thresholds,
    add_up,
    count_rows,
    count_score_cells,
    find_thresholds,
    shard_groups,
    survey,
)
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.sampling_keys import RankTable, cell_bits
from selectmoe.selection.signal_order import signal_order
from selectmoe.selection.top_k import WHOLE_CORPUS, Histogram, Scope, Threshold


@dataclass(frozen=True, slots=True, eq=False)
class ChosenRule:
    """The rule, and where it keeps less than was asked for, a sentence about that."""

    rule: ThresholdRule
    shortfalls: list[str] = field(default_factory=list)
    num_over_maximum: int = 0
    """Rows above the floor that are after the maximum of their dataset."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRows:
    """The stored scores that a strategy chooses from."""

    groups: Sequence[ShardGroup]
    survey: Survey
    map_items: MapItems

    def count(self, pool: Pool) -> RowCounts:
        return RowCounts.total(self.map_items(partial(count_rows, pool), self.groups))

    def thresholds(
        self,
        num_kept: Mapping[Scope, int],
        pool: Pool,
        histograms: Mapping[Scope, Histogram] | None = None,
    ) -> dict[Scope, Threshold]:
        return find_thresholds(
            self.groups, num_kept, pool, map_items=self.map_items, histograms=histograms
        )

    def first_digits(self, *, by_dataset: bool) -> dict[Scope, Histogram]:
        """Of all scores, as the survey has counted them."""
        histograms = self.survey.first_digits
        if by_dataset:
            return {**dict(sorted(histograms.items()))}
        return {WHOLE_CORPUS: Histogram.total(histograms.values())}


def survey_scored(folder: RunFolder, map_items: MapItems) -> ScoredRows:
    """The scores in a folder, with what their first pass counts."""
    groups = shard_groups(folder.scored_shards())
    return ScoredRows(groups, Survey.total(map_items(survey, groups)), map_items)


def choose_rows(config: SelectConfig, scored: ScoredRows) -> ChosenRule:
    """The rule of `config.selection.strategy`; the same for any partition of the rows.

    Raises ConfigError for a budget that the rows cannot meet.
    """
    rank_by = config.selection.rank_by
    if rank_by != GATE:
        order, lacking = signal_order(rank_by, scored.groups, scored.map_items)
        chosen = _choose_by(order, config, scored, find_floors(config, scored))
        return replace(chosen, shortfalls=[*chosen.shortfalls, *lacking])
    floors = find_floors(config, scored)
    return _choose_by(find_order(config, scored, floors), config, scored, floors)


def _choose_by(
    order: Order, config: SelectConfig, scored: ScoredRows, floors: Thresholds
) -> ChosenRule:
    pool = Pool(order, floors)
    limits = config.selection
    if limits.min_per_dataset is None and limits.max_per_dataset is None:
        return _within_budget(config, scored, pool)
    if config.per_dataset:
        return _of_each_dataset(config, scored, pool)
    return _of_corpus_with_limits(config, scored, pool)


def find_floors(config: SelectConfig, scored: ScoredRows) -> Thresholds:
    """The last rows that are not among the worst `selection.floor`, ties settled by row key; of
    each dataset with `per_dataset`."""
    if not config.selection.floor:
        return {}
    num_rows = scope_totals(scored.survey.num_rows, by_dataset=config.per_dataset)
    above = {name: num_above_floor(n, config.selection.floor) for name, n in num_rows.items()}
    histograms = scored.first_digits(by_dataset=config.per_dataset)
    return scored.thresholds(above, Pool(), histograms)


def find_order(config: SelectConfig, scored: ScoredRows, floors: Thresholds) -> Order:
    """The order of the strategy; ranks of strategy=sampled are among the rows above the floor."""
    selection = config.selection
    match selection.strategy:
        case "longest":
            return ByAnswerTokens()
        case "random":
            return BySamplingKey(selection.seed)
        case "sampled" if selection.temperature > 0:
            num_rows = scope_totals(scored.survey.num_rows, by_dataset=config.per_dataset)
            bits = cell_bits(len(num_rows))
            count = partial(count_score_cells, Pool(ByScore(), floors), tuple(num_rows), bits)
            cells = add_up(scored.map_items(count, scored.groups))
            ranks = {name: RankTable.of(counts, cell_bits=bits) for name, counts in cells.items()}
            return BySamplingKey(selection.seed, selection.temperature, ranks)
    return ByScore()


def _within_budget(config: SelectConfig, scored: ScoredRows, pool: Pool) -> ChosenRule:
    """No limits of datasets: one threshold for the corpus or for each dataset."""
    survey, by_dataset = scored.survey, config.per_dataset
    num_scored = scope_totals(survey.num_rows, by_dataset=by_dataset)
    available = {name: num_above_floor(n, config.selection.floor) for name, n in num_scored.items()}
    dropped = Fate.OUTRANKED
    if config.budget.unit == "tokens":
        budgets = dict.fromkeys(num_scored, int(config.budget.amount))
        num_kept = rows_within_tokens(scored.groups, budgets, pool, map_items=scored.map_items)
        dropped = Fate.OVER_TOKEN_BUDGET
        asked = num_kept
    else:
        asked = num_asked(num_scored, config.budget)
        num_kept = {name: min(asked[name], available[name]) for name in asked}
    is_plain = isinstance(pool.order, ByScore) and not pool.floors
    histograms = scored.first_digits(by_dataset=by_dataset) if is_plain else None
    thresholds = scored.thresholds(num_kept, pool, histograms)
    rule = ThresholdRule(pool.order, thresholds, pool.floors, dropped=dropped)
    return ChosenRule(rule, shortfalls(config, num_kept, asked, available))


def shortfalls(
    config: SelectConfig,
    num_kept: Mapping[Scope, int],
    asked: Mapping[Scope, int],
    available: Mapping[Scope, int],
) -> list[str]:
    """A sentence where a budget keeps every row that may be kept."""
    above = " above the floor" if config.selection.floor else ""
    budget, of = config.budget, " of a dataset" if WHOLE_CORPUS not in num_kept else ""
    short = [
        name
        for name, number in num_kept.items()
        if number < asked[name] or (budget.unit == "tokens" and number == available[name])
    ]
    if not short:
        return []
    kept = sum(num_kept[name] for name in short)
    which = f"all {kept:,} scored rows{above}"
    if of:
        which += f" of {len(short):,} datasets"
    return [f"selection.{budget.unit}={int(budget.amount):,}{of} keeps {which}"]


def _of_each_dataset(config: SelectConfig, scored: ScoredRows, pool: Pool) -> ChosenRule:
    """The budget of each dataset, raised or lowered to its limits."""
    plain = replace(
        config, selection=replace(config.selection, min_per_dataset=None, max_per_dataset=None)
    )
    chosen = _within_budget(plain, scored, pool)
    least = config.selection.min_per_dataset or 0
    most = config.selection.max_per_dataset
    num_rows = scored.survey.num_rows
    available = {name: num_above_floor(n, config.selection.floor) for name, n in num_rows.items()}
    wanted: dict[Scope, int] = {}
    full: set[str] = set()
    for name, threshold in chosen.rule.thresholds.items():
        assert name is not None
        number = max(threshold.num_kept, least)
        wanted[name] = min(number, most or number, available[name])
        if most and threshold.num_kept > most:
            full.add(name)
    thresholds = scored.thresholds(wanted, pool)
    rule = replace(chosen.rule, thresholds=thresholds, full_datasets=frozenset(full))
    num_over = sum(available[name] - wanted[name] for name in full)
    return ChosenRule(rule, chosen.shortfalls, num_over)


def _of_corpus_with_limits(config: SelectConfig, scored: ScoredRows, pool: Pool) -> ChosenRule:
    """First the best `min_per_dataset` rows of each dataset, then the best of the others, of which
    no dataset has more than `max_per_dataset` in all."""
    available = scored.count(pool).num_rows
    least, most = config.selection.min_per_dataset or 0, config.selection.max_per_dataset
    names = sorted(name for name in available if available[name])
    minimum: dict[Scope, int] = {name: min(least, available[name]) for name in names if least}
    maximum: dict[Scope, int] = {name: min(most, available[name]) for name in names if most}
    taken, tops = scored.thresholds(minimum, pool), scored.thresholds(maximum, pool)
    competing = replace(pool, taken=taken, limits=(tops,) if tops else ())
    num_kept, told = _num_competing(config, scored, competing, sum(minimum.values()))
    cut = scored.thresholds({WHOLE_CORPUS: num_kept} if num_kept else {}, competing)
    last = cut.get(WHOLE_CORPUS)
    thresholds: dict[Scope, Threshold] = {
        name: threshold
        for name in names
        if (threshold := _combined(last, taken.get(name), tops.get(name))) is not None
    }
    counts = scored.count(replace(pool, limits=(thresholds,))).num_rows
    full = {
        name
        for name in names
        if name in tops and thresholds.get(name) is tops[name] and available[name] > maximum[name]
    }
    dropped = Fate.OVER_TOKEN_BUDGET if config.budget.unit == "tokens" else Fate.OUTRANKED
    rule = ThresholdRule(
        pool.order,
        {name: replace(row, num_kept=counts[str(name)]) for name, row in thresholds.items()},
        pool.floors,
        frozenset(full),
        dropped,
    )
    return ChosenRule(rule, told, sum(available[name] - counts[name] for name in full))


def _num_competing(
    config: SelectConfig, scored: ScoredRows, competing: Pool, num_taken: int
) -> tuple[int, list[str]]:
    """How many rows are kept beside those that are taken already, and where that is less than was
    asked for, a sentence about it."""
    room = scored.count(competing)
    budget, limits = config.budget, config.selection
    least = f"selection.min_per_dataset={limits.min_per_dataset}"
    if budget.unit == "tokens":
        taken = scored.count(replace(competing, taken={}, limits=(competing.taken,)))
        left = int(budget.amount) - (taken.num_answer_tokens.total() if competing.taken else 0)
        if left < 0:
            raise ConfigError(
                f"selection.tokens (--tokens) must be at least "
                f"{taken.num_answer_tokens.total():,}, the answer tokens of {least}, got "
                f"{int(budget.amount):,}"
            )
        [number] = rows_within_tokens(
            scored.groups, {WHOLE_CORPUS: left}, competing, map_items=scored.map_items
        ).values()
        return number, _told(number == room.num_rows.total(), config, num_taken + number)
    [asked] = num_asked(scope_totals(scored.survey.num_rows, by_dataset=False), budget).values()
    if num_taken > asked:
        raise ConfigError(
            f"{least} must leave room within the budget: it takes {num_taken:,} rows, and "
            f"{asked:,} are to be kept"
        )
    number = min(asked - num_taken, room.num_rows.total())
    return number, _told(number < asked - num_taken, config, num_taken + number, asked)


def _told(
    is_short: bool, config: SelectConfig, num_kept: int, num_asked: int | None = None
) -> list[str]:
    if not is_short:
        return []
    of = f" of {num_asked:,}" if num_asked is not None else ""
    most = config.selection.max_per_dataset
    limit = f"selection.max_per_dataset={most}" if most else "the number of scored rows"
    return [f"{limit} leaves {num_kept:,} rows{of} to keep"]


def _combined(
    last: Threshold | None, taken: Threshold | None, top: Threshold | None
) -> Threshold | None:
    """The last kept row of a dataset: that of the corpus, but not before the last one that is
    taken anyway, nor after the last one that its maximum allows."""
    latest = max((row for row in (last, taken) if row is not None), key=_place, default=None)
    if latest is None or top is None:
        return latest
    return min(latest, top, key=_place)


def _place(row: Threshold) -> tuple[float, str]:
    return -row.score, row.row_key
