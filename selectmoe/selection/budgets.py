"""How many rows of each scope a budget keeps: a percentage, a number of rows, or answer tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

from selectmoe.config.selection import Budget
from selectmoe.corpus.map_items import MapItems
from selectmoe.errors import ConfigError
from selectmoe.selection.passes import (
    Pool,
    RowCounts,
    ShardGroup,
    count_rows,
    find_thresholds,
)
from selectmoe.selection.top_k import WHOLE_CORPUS, Scope, num_to_keep


def num_above_floor(num_scored: int, floor: float) -> int:
    """Rows that are left when floor(fraction * rows) of them are dropped; at least one."""
    return num_scored - int(Fraction(str(floor)) * num_scored)


def num_asked(num_scored: Mapping[Scope, int], budget: Budget) -> dict[Scope, int]:
    """What a budget of rows or a percentage asks for in each scope."""
    if budget.unit == "rows":
        return dict.fromkeys(num_scored, int(budget.amount))
    assert budget.unit == "fraction"
    return {name: num_to_keep(number, budget.amount) for name, number in num_scored.items()}


def scope_totals(counts: Mapping[str, int], *, by_dataset: bool) -> dict[Scope, int]:
    """Counts by dataset, or their sum; nothing where there is no row."""
    if by_dataset:
        return {name: counts[name] for name in sorted(counts) if counts[name]}
    total = sum(counts.values())
    return {WHOLE_CORPUS: total} if total else {}


def rows_within_tokens(
    groups: Sequence[ShardGroup],
    budgets: Mapping[Scope, int],
    pool: Pool,
    *,
    map_items: MapItems,
) -> dict[Scope, int]:
    """The number of rows in the order that together have at most so many answer tokens: all before
    the first row that exceeds the budget, also where a shorter one would still fit.

    Raises ConfigError where that is the very first row, unless others are taken already.
    """
    by_dataset = WHOLE_CORPUS not in budgets
    competing = RowCounts.total(map_items(partial(count_rows, pool), groups))
    num_rows = scope_totals(competing.num_rows, by_dataset=by_dataset)
    num_tokens = scope_totals(competing.num_answer_tokens, by_dataset=by_dataset)
    scarce = {
        name: budget + 1 for name, budget in budgets.items() if num_tokens.get(name, 0) > budget
    }
    # The row with the first token too many.
    exceeding = find_thresholds(groups, scarce, replace(pool, weight="tokens"), map_items=map_items)
    if not exceeding:
        return {name: num_rows.get(name, 0) for name in budgets}
    up_to = replace(pool, limits=(*pool.limits, exceeding))
    counted = RowCounts.total(map_items(partial(count_rows, up_to), groups))
    before = scope_totals(counted.num_rows, by_dataset=by_dataset)
    tokens = scope_totals(counted.num_answer_tokens, by_dataset=by_dataset)
    for name in exceeding:
        if before[name] == 1 and not pool.taken:
            of = "" if name is WHOLE_CORPUS else f" of {name}"
            raise ConfigError(
                f"selection.tokens (--tokens) must be at least {tokens[name]:,}, the answer tokens "
                f"of the first row{of}, got {budgets[name]:,}"
            )
    return {
        name: before[name] - 1 if name in exceeding else num_rows.get(name, 0) for name in budgets
    }
