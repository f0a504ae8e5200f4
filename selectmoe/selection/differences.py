"""How the selected rows differ from all scored ones in length and source, in words."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SHORT, LONG = 0.7, 1.5  # of the median answer of the scored rows
LARGE_SHARE = 3.0  # of a dataset's share of the scored rows
# A dataset of which chance keeps 5 rows keeps none with a probability of e^-5, under 1 %.
FEWEST_EXPECTED = 5.0
FEWEST_SELECTED = 10


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of one dataset."""

    num_scored: int
    num_selected: int


@dataclass(frozen=True, slots=True)
class MedianTokens:
    """Median number of answer tokens; None where there is no row."""

    scored: float | None
    selected: float | None


def median_of_counts(counts: Mapping[int, int]) -> float | None:
    """Median of values that occur so many times; None where there are none."""
    total = sum(counts.values())
    if not total:
        return None
    # One middle value twice, or the two middle ones of an even number.
    middles = ((total + 1) // 2, total // 2 + 1)
    found, num_below = [], 0
    for value, count in sorted(counts.items()):
        num_below += count
        found += [value] * sum(num_below - count < middle <= num_below for middle in middles)
    return math.fsum(found) / 2


def sum_of_counts(counts: Mapping[int, int]) -> int:
    """Sum of values that occur so many times."""
    return sum(value * count for value, count in counts.items())


def differences(datasets: Mapping[str, Kept], median_answer_tokens: MedianTokens) -> list[str]:
    """A sentence for each difference that a user should look at before training on the rows."""
    return [*_of_length(median_answer_tokens), *_of_sources(datasets)]


def _of_length(median: MedianTokens) -> Iterator[str]:
    scored, selected = median.scored, median.selected
    if not scored or selected is None or SHORT <= selected / scored <= LONG:
        return
    word = "short" if selected < scored else "long"
    yield (
        f"the selected rows have {word} answers: the median has {selected:,g} tokens, that of all "
        f"scored rows {scored:,g}"
    )


def _of_sources(datasets: Mapping[str, Kept]) -> Iterator[str]:
    num_scored = sum(rows.num_scored for rows in datasets.values())
    num_selected = sum(rows.num_selected for rows in datasets.values())
    for name, rows in datasets.items():
        expected = num_selected * rows.num_scored / max(num_scored, 1)
        if rows.num_selected == 0 and expected >= FEWEST_EXPECTED:
            yield (
                f"no row of {name} is selected; by its share of the scored rows it would have "
                f"{expected:,.0f}"
            )
        elif rows.num_selected > LARGE_SHARE * expected and rows.num_selected >= FEWEST_SELECTED:
            yield (
                f"{name} has {rows.num_selected / num_selected:.0%} of the selected rows and "
                f"{rows.num_scored / num_scored:.0%} of the scored ones"
            )
