"""The figures of a report: each a chart, a sentence, and the chart's numbers as a table."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selectmoe.report import charts
from selectmoe.report.page_text import shortened
from selectmoe.report.row_sample import RowSample, TextCounts, rank_correlation
from selectmoe.report.score_survey import ScoreSurvey, length_bin_names, length_bins

# Shape letters: N = rows of the sample, C = categories.

MOST_CATEGORIES = 12
MOST_THRESHOLDS = 8
MOST_POINTS = 1_500
NUM_SIGNAL_GROUPS = 5  # of equal numbers of rows
OTHERS = "others"
POOL_LABEL = "all scored rows"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and its table. Cells are texts; the first of a row is its heading."""

    key: str
    title: str
    note: str
    svg: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def score_figure(survey: ScoreSurvey, edges: np.ndarray, thresholds: Sequence[float]) -> Figure:
    """The distribution of scores, kept on dropped rows."""
    dropped, kept = survey.scores
    lines = sorted(thresholds) if len(thresholds) <= MOST_THRESHOLDS else []
    names = [f"{low:.4f} to {high:.4f}" for low, high in itertools.pairwise(edges)]
    names[0], names[-1] = f"below {edges[1]:.4f}", f"from {edges[-2]:.4f}"
    rows = [(name, f"{d:,}", f"{k:,}") for name, d, k in zip(names, dropped, kept, strict=True)]
    return Figure(
        "scores",
        "Scores and threshold" if thresholds else "Scores",
        "All scored rows; the first and the last bar also hold what lies beyond them.",
        charts.histogram(edges, dropped, kept, lines),
        ("score", "dropped", "kept"),
        rows,
    )


def source_figure(datasets: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Datasets by their share of the scored and of the kept rows."""
    pool = Counter({name: int(counts["num_scored"]) for name, counts in datasets.items()})
    kept = Counter({name: int(counts["num_selected"]) for name, counts in datasets.items()})
    labels = [name for name, _ in pool.most_common()]
    words = ("sources", "By source", "All scored rows, by dataset.")
    return _shares(words, labels, pool, kept)


def length_figure(survey: ScoreSurvey) -> Figure:
    """Numbers of answer tokens, from the shortest bin to the longest that occur."""
    names = length_bin_names()
    dropped, kept = survey.answer_tokens
    used = np.flatnonzero(dropped + kept)
    chosen = range(int(used[0]), int(used[-1]) + 1)
    pool_counts = Counter({names[n]: int(dropped[n] + kept[n]) for n in chosen})
    kept_counts = Counter({names[n]: int(kept[n]) for n in chosen})
    return _shares(
        ("lengths", "By answer length", "All scored rows, by number of answer tokens."),
        [names[n] for n in chosen],
        pool_counts,
        kept_counts,
        most=len(names),
    )


def text_figures(pool: TextCounts, kept: TextCounts) -> list[Figure]:
    """Scripts and turns, counted in a sample."""
    scripts = [name for name, _ in (pool.scripts + kept.scripts).most_common()]
    turns = sorted(
        pool.turns.keys() | kept.turns.keys(), key=lambda name: int(name.partition(" ")[0])
    )
    note = f"A random sample of {pool.num_rows:,} rows and of {kept.num_rows:,} kept rows"
    by_script = ("scripts", "By language script", f"{note}, by the script of most of its letters.")
    by_turns = ("turns", "By number of turns", f"{note}, by number of assistant turns.")
    return [
        _shares(by_script, scripts, pool.scripts, kept.scripts),
        _shares(by_turns, turns, pool.turns, kept.turns, most=len(turns)),
    ]


def score_by_length_figure(sample: RowSample) -> Figure:
    """Score against answer length, whose correlation shows a bias towards short or long rows."""
    names = length_bin_names()
    bins = length_bins(sample.answer_tokens)
    groups = {names[number]: bins == number for number in np.unique(bins).tolist()}
    lengths = np.maximum(sample.answer_tokens, 1)
    return _score_against(("score-by-length", "answer tokens"), lengths, sample, groups, log=True)


def signal_figures(sample: RowSample) -> list[Figure]:
    """The score against each other signal that the run has stored beside it."""
    figures: list[Figure] = []
    for name, values in sample.signals.items():
        known = np.isfinite(values)
        if not known.any():
            continue
        of_known = sample.where(known)
        signal = values[known]
        edges = np.quantile(signal, np.linspace(0, 1, NUM_SIGNAL_GROUPS + 1))
        bins = np.searchsorted(edges[1:-1], signal, side="right")
        groups = {
            f"{edges[number]:.4g} to {edges[number + 1]:.4g}": bins == number
            for number in np.unique(bins).tolist()
        }
        words = (f"signal-{len(figures)}", shortened(name, 40))
        figures.append(_score_against(words, signal, of_known, groups))
    return figures


def _score_against(
    key_and_name: tuple[str, str],
    values: np.ndarray,
    sample: RowSample,
    groups: Mapping[str, np.ndarray],
    *,
    log: bool = False,
) -> Figure:
    """values: (N,), of the rows of the sample. groups: bool (N,) by name, the rows of the table."""
    rows = [
        (
            group,
            f"{inside.sum():,}",
            f"{np.median(sample.scores[inside]):.4f}",
            charts.percent(float(sample.kept[inside].mean())),
        )
        for group, inside in groups.items()
    ]
    key, name = key_and_name
    drawn = slice(MOST_POINTS)
    svg = charts.scatter(
        key,
        values[drawn],
        sample.scores[drawn],
        sample.kept[drawn],
        labels=(name, "score"),
        log=log,
    )
    correlation = rank_correlation(sample.scores, values)
    note = f"{_points(sample)}{_correlation(correlation)}"
    headers = (name, "rows of the sample", "median score", "kept of these")
    return Figure(key, f"Score against {name}", note, svg, headers, rows)


def _points(sample: RowSample) -> str:
    num_rows = len(sample.scores)
    drawn = f", {MOST_POINTS:,} of them drawn" if num_rows > MOST_POINTS else ""
    return f"A random sample of {num_rows:,} scored rows{drawn}. "


def _correlation(value: float | None) -> str:
    return "" if value is None else f"Rank correlation (Spearman): {_signed(value)}."


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _shares(
    words: tuple[str, str, str],
    labels: Sequence[str],
    pool: Counter[str],
    kept: Counter[str],
    *,
    most: int = MOST_CATEGORIES,
) -> Figure:
    """A figure of shares; beyond `most` categories the smallest count together.

    words: key, title and note of the figure.
    """
    key, title, note = words
    shown = list(labels) if len(labels) <= most else list(labels[: most - 1])
    others = labels[len(shown) :]
    groups = [(name, [name]) for name in shown] + ([(OTHERS, list(others))] if others else [])
    counts = np.array(
        [[sum(side[name] for name in names) for side in (pool, kept)] for _, names in groups]
    )
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    numbers = zip(counts.tolist(), shares.tolist(), strict=True)
    rows = [
        (shortened(name, 60), *(f"{count:,}" for count in pair), *map(charts.percent, of_all))
        for (name, _), (pair, of_all) in zip(groups, numbers, strict=True)
    ]
    short = [shortened(name, 22) for name, _ in groups]
    svg = charts.shares(key, short, shares[:, 0], shares[:, 1], pool_label=POOL_LABEL)
    headers = (title.removeprefix("By "), POOL_LABEL, "kept rows", "share of all", "share of kept")
    return Figure(key, title, note, svg, headers, rows)
