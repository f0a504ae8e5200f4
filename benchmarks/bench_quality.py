"""Evaluation of the selector's score against baseline scores: one table.

    python benchmarks/bench_quality.py --data DIR [--selector DIR] [--quick]

--data: a folder with instructions/ (.jsonl files of the datasets cot, dolly, flan_v2 and oasst1)
and quality/ (answers rated by people or a model). Without it, or with --quick, the demo corpus is
used, and the columns for ratings stay empty.

The rows are the test set of the recipes: half of the tenth of the conversations that no recipe
trains on; the other half was the validation set. AUROC: the probability that an original answer
scores above a corrupted one; 0.5 is chance.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plain_text_target import plain_text_target, read_paragraphs
from benchmarks.quality_rows import QualityRows, Sizes, read_rows
from benchmarks.quality_scorers import (
    SCORERS,
    Selector,
    length_of_best,
    like_length,
    loss_scores,
    matched_auroc,
    mean_of,
    pairs_right,
    probe_scores,
    scorer,
)
from benchmarks.quality_warmups import (
    LEFT_OUT,
    rank_correlations,
    scores_after_warmups,
    warmups_for_stability,
    warmups_without_kinds,
)
from benchmarks.quality_worth import WorthSettings, corrupted_pool, measure_worth
from benchmarks.results import describe_run, one_line_errors, write_result
from benchmarks.worker_tasks import Task, run_tasks
from recipes.held_out_auroc import Copies, auroc
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import Sample

PROBE, LOSSES, FITS = "linear probe", "losses", "gates fitted anew"
INDEPENDENT_SCORERS = ("gate", "untrained gate", "length", "random")
CORRUPTED_FRACTION = 0.3
NUM_PARAGRAPHS = 200
RATING_COLUMNS = ("pairs", "pairs_matched", "rated", "rated_matched")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Amount of data and finetuning."""

    sizes: Sizes
    worth: WorthSettings


FULL = Extent(
    sizes=Sizes(num_per_family=40, num_held_out=100, num_training=2_000, num_pool=3_000),
    worth=WorthSettings(only={0.20: ("gate",)}),
)
# On the demo corpus, on which the target was not trained: three epochs of a few steps.
QUICK = Extent(
    sizes=Sizes(num_per_family=30, num_held_out=30, num_training=300, num_pool=300),
    worth=WorthSettings(fractions=(0.05,), seeds=(0,), overrides=("preset=tiny",)),
)


class ScoreBook:
    """The scores of one scorer, by sample."""

    def __init__(self, samples: Sequence[Sample], scores: np.ndarray) -> None:
        self._by_sample = dict(zip(samples, scores.tolist(), strict=True))

    def of(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.array([self._by_sample[sample] for sample in samples])


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """All scores."""

    books: Mapping[str, ScoreBook]  # by scorer
    left_out: Mapping[str, Mapping[str, ScoreBook]]  # by trained scorer, by left-out group
    stability: Mapping[str, np.ndarray]  # by warm-up


def uncorrupted_rows(rows: QualityRows) -> list[Sample]:
    rated = rows.rated.samples if rows.rated else []
    return [*rows.real, *rated]


def scored_rows(rows: QualityRows, extra: Sequence[Sample]) -> list[Sample]:
    """Every sample that a metric needs a score of, once."""
    copies = [made for kinds in (rows.seen, rows.unseen) for made in kinds.values()]
    rated = [part.samples for part in (rows.pairs, rows.rated) if part]
    parts = [rows.real, *(list(made.values()) for made in copies), *rated, rows.pool, extra]
    return list(dict.fromkeys(sample for part in parts for sample in part))


def score_everything(
    selector: Selector,
    rows: QualityRows,
    samples: Sequence[Sample],
    *,
    num_workers: int,
    scorers: Sequence[str] = SCORERS,
) -> Scores:
    """scorers: those that are compared; fewer than all leave out the fits of new gates."""
    is_whole = set(scorers) == set(SCORERS)
    stable = warmups_for_stability(rows.training) if is_whole else []
    without = warmups_without_kinds(rows.training) if is_whole else []
    rows_by_group = {name: rows_without(rows, name) for name in LEFT_OUT}
    tasks: dict[str, Task] = {}
    if PROBE in scorers:
        tasks[PROBE] = (probe_scores, (selector, rows.training, samples, LEFT_OUT))
    if set(scorers) & {"-NLL", "IFD"}:
        tasks[LOSSES] = (loss_scores, (selector, samples))
    for name in INDEPENDENT_SCORERS:
        if name in scorers:
            tasks[name] = (score_independently, (name, selector, samples))
    if is_whole:
        samples_of = {**rows_by_group, **{w.name: uncorrupted_rows(rows) for w in stable}}
        tasks[FITS] = (scores_after_warmups, (selector, samples_of, [*without, *stable]))
    results = run_tasks(tasks, num_workers=num_workers)
    probe, fitted = results.get(PROBE, {}), results.get(FITS, {})
    by_scorer = {**results, **results.get(LOSSES, {}), PROBE: probe.get("")}
    left_out: dict[str, dict[str, ScoreBook]] = {}
    if without:
        left_out["gate"] = {
            name: ScoreBook(of_group, fitted[name]) for name, of_group in rows_by_group.items()
        }
    if probe:
        left_out[PROBE] = {name: ScoreBook(samples, probe[name]) for name in LEFT_OUT}
    return Scores(
        books={name: ScoreBook(samples, by_scorer[name]) for name in scorers},
        left_out=left_out,
        stability={warmup.name: fitted[warmup.name] for warmup in stable},
    )


def rows_without(rows: QualityRows, group: str) -> list[Sample]:
    """Originals, and their copies by the left-out kinds."""
    copies = [rows.seen.get(kind, {}).values() for kind in LEFT_OUT[group]]
    return list(dict.fromkeys([*rows.real, *(copy for made in copies for copy in made)]))


def score_independently(name: str, selector: Selector, samples: Sequence[Sample]) -> np.ndarray:
    return scorer(name, selector)(samples)


def auroc_by_kind(book: ScoreBook, rows: QualityRows, copies: Copies) -> dict[str, float]:
    real = book.of(rows.real)
    return {
        kind: auroc(real[list(made)], book.of(list(made.values()))) for kind, made in copies.items()
    }


def matched_by_kind(
    book: ScoreBook, lengths: ScoreBook, rows: QualityRows, copies: Copies
) -> dict[str, float | None]:
    """As `auroc_by_kind`, restricted to pairs of answers of equal length."""
    matched: dict[str, float | None] = {}
    for kind, made in copies.items():
        real, bad = [rows.real[n] for n in made], list(made.values())
        good_lengths, bad_lengths = lengths.of(real), lengths.of(bad)
        matched[kind] = matched_auroc(book.of(real), book.of(bad), good_lengths, bad_lengths)
    return matched


def auroc_left_out(
    books: Mapping[str, ScoreBook], lengths: ScoreBook, rows: QualityRows
) -> tuple[dict[str, float], dict[str, float | None]]:
    """By kind, of all copies and of pairs of answers of equal length."""
    by_kind: dict[str, float] = {}
    matched: dict[str, float | None] = {}
    for group, kinds in LEFT_OUT.items():
        copies = {kind: rows.seen[kind] for kind in kinds if kind in rows.seen}
        by_kind |= auroc_by_kind(books[group], rows, copies)
        matched |= matched_by_kind(books[group], lengths, rows, copies)
    return by_kind, matched


def rating_measures(
    book: ScoreBook, lengths: ScoreBook, rows: QualityRows
) -> dict[str, float | None]:
    """How well scores predict ratings, also at equal length; None where there are no ratings."""
    found: dict[str, float | None] = dict.fromkeys(RATING_COLUMNS)
    if rows.pairs:
        scores, ids = book.of(rows.pairs.samples), np.array(rows.pairs.pair_ids)
        found["pairs"] = pairs_right(scores, rows.pairs.labels, ids.tolist())
        alike = like_length(lengths.of(rows.pairs.samples), ids.tolist())
        if alike.any():
            labels = rows.pairs.labels[alike]
            found["pairs_matched"] = pairs_right(scores[alike], labels, ids[alike].tolist())
    if rows.rated:
        scores, sizes = book.of(rows.rated.samples), lengths.of(rows.rated.samples)
        good = rows.rated.labels
        found["rated"] = auroc(scores[good], scores[~good])
        found["rated_matched"] = matched_auroc(
            scores[good], scores[~good], sizes[good], sizes[~good]
        )
    return found


def measures_of(name: str, scores: Scores, rows: QualityRows) -> dict[str, Any]:
    """All metrics of one scorer; None if not applicable or if the rows are missing."""
    book, lengths = scores.books[name], scores.books["length"]
    left_out, left_out_matched = (
        auroc_left_out(scores.left_out[name], lengths, rows)
        if name in scores.left_out
        else (None, None)
    )
    seen, unseen = (auroc_by_kind(book, rows, copies) for copies in (rows.seen, rows.unseen))
    matched = matched_by_kind(book, lengths, rows, rows.seen)
    unseen_matched = matched_by_kind(book, lengths, rows, rows.unseen)
    return {
        "scorer": name,
        "seen": mean_of(seen),
        "seen_matched": mean_of(matched),
        "left_out": mean_of(left_out) if left_out else None,
        "left_out_matched": mean_of(left_out_matched) if left_out_matched else None,
        "unseen": mean_of(unseen),
        "unseen_matched": mean_of(unseen_matched),
        **rating_measures(book, lengths, rows),
        "answer_tokens": length_of_best(book.of(rows.pool), lengths.of(rows.pool)),
        "by_kind": {
            "seen": seen,
            "seen_matched": matched,
            "left_out": left_out,
            "left_out_matched": left_out_matched,
            "unseen": unseen,
            "unseen_matched": unseen_matched,
        },
    }


COLUMNS = {
    "seen": "AUROC, trained kinds",
    "seen_matched": "equal length",
    "left_out": "left-out kinds",
    "left_out_matched": "equal length",
    "unseen": "unseen kinds",
    "unseen_matched": "equal length",
    "pairs": "pair accuracy",
    "pairs_matched": "like length",
    "rated": "AUROC, rated rows",
    "rated_matched": "equal length",
    "answer_tokens": "median answer tokens, best 5 % / pool",
    "worth": "loss, best 5 %",
    "worth_corrupted": "loss, best 5 %, 30 % corrupted",
}


def format_table(result: Mapping[str, Any]) -> str:
    """A Markdown table, one line per scorer."""
    lines = ["| scorer | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in result["scorers"]:
        worth = {part: format_worth(row["scorer"], result[part]) for part in WORTH_PARTS}
        cells = [worth[key] if key in worth else format_number(row[key]) for key in COLUMNS]
        lines.append("| " + " | ".join([row["scorer"], *cells]) + " |")
    if result["rank_correlations"]:
        lowest = min(result["rank_correlations"].values())
        lines.append(f"\nlowest rank correlation of two warm-ups: {format_number(lowest)}")
    return "\n".join(lines)


def format_worth(scorer: str, worth: Sequence[Mapping[str, Any]]) -> str:
    """The loss after training on the scorer's smallest selection, minus random's, with p values."""
    of_scorer = [row for row in worth if row["scorer"] == scorer]
    if not of_scorer:
        return ""
    row = min(of_scorer, key=lambda row: row["fraction"])
    if row["difference"] is None:
        return f"{row['loss']:.3f}"
    p_values = [f"{row[key]:.1g}" for key in ("p_rows", "p_seeds") if row[key] is not None]
    return f"{row['difference']:+.3f} (p {', '.join(p_values)})"


def format_number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value or "")


WORTH_PARTS = ("worth", "worth_corrupted")


def worth_of_selections(
    settings: WorthSettings,
    held_out: Sequence[Sample],
    pool: tuple[list[Sample], np.ndarray | None],
    scores: Scores,
) -> list[dict[str, Any]]:
    """pool: the rows, and a mask of the corrupted copies among them."""
    samples, corrupted = pool
    books = {name: scores.books[name] for name in settings.scorers}
    by_scorer = {name: book.of(samples) for name, book in books.items()}
    rows = measure_worth(samples, held_out, by_scorer, settings, corrupted=corrupted)
    return [asdict(row) for row in rows]


def with_target(
    settings: WorthSettings, data: Path | None, selector: Selector, folder: Path
) -> WorthSettings:
    """Uses `plain_text_target` as the target if the data has books."""
    settings = replace(settings, model=str(selector.folder))
    books = data and data / "text" / "books.txt.gz"
    if books is None or not books.is_file():
        return settings
    texts = read_paragraphs(books, num_paragraphs=NUM_PARAGRAPHS)
    return replace(settings, model=str(plain_text_target(texts, settings, folder)))


def measure(args: argparse.Namespace, extent: Extent) -> dict[str, Any]:
    data = None if args.quick else args.data
    rows = read_rows(data, extent.sizes, seed=args.seed)
    selector = Selector(folder=args.selector, seed=args.seed)
    dirty = corrupted_pool(rows.pool, fraction=CORRUPTED_FRACTION, seed=args.seed)
    samples = scored_rows(rows, dirty[0])
    logger.info("%d rows to score, %d training rows", len(samples), len(rows.training))
    scores = score_everything(
        selector,
        rows,
        samples,
        num_workers=args.workers,
        scorers=tuple(args.scorers),
    )
    with TemporaryDirectory() as folder:
        settings = replace(extent.worth, num_workers=args.workers, scorers=tuple(args.scorers))
        settings = with_target(settings, data, selector, Path(folder))
        worth, worth_corrupted = (
            worth_of_selections(settings, rows.held_out, pool, scores)
            for pool in ((rows.pool, None), dirty)
        )
    return {
        **describe_run(),
        "seed": args.seed,
        "num_rows": {
            "real": len(rows.real),
            "training": len(rows.training),
            "pool": len(rows.pool),
            "held_out": len(rows.held_out),
        },
        "scorers": [measures_of(name, scores, rows) for name in args.scorers],
        "rank_correlations": rank_correlations(dict(scores.stability)) if scores.stability else {},
        "worth": worth,
        "worth_corrupted": worth_corrupted,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with instructions/ and quality/")
    parser.add_argument("--selector", type=Path, default=EMBEDDED_SELECTOR)
    parser.add_argument("--quick", action="store_true", help="use the demo corpus")
    parser.add_argument(
        "--scorers", nargs="+", choices=SCORERS, default=SCORERS,
        help="with fewer than all, no gates are fitted anew, which takes a third of the time",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with one_line_errors():
        result = measure(args, QUICK if args.quick or args.data is None else FULL)
    name = "quality_quick" if args.quick else "quality"
    if set(args.scorers) != set(SCORERS):
        name += "_some"
    write_result(name, result)
    print(f"{format_table(result)}\n\nall results: benchmarks/results/{name}.json")


if __name__ == "__main__":
    main()
