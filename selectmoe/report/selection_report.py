"""Writes report.html of a finished selection run, from its files and a pass over its scores."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.data.writers import whole_file
from selectmoe.errors import DataError, SelectMoeError
from selectmoe.report import figures
from selectmoe.report.charts import require_matplotlib
from selectmoe.report.examples import Example, ScoreTexts, read_examples
from selectmoe.report.page import ReportContent, render
from selectmoe.report.row_sample import (
    RowSample,
    count_kept_texts,
    count_pool_texts,
    disagreements,
    read_duplicates,
    read_sample,
)
from selectmoe.report.score_survey import (
    FoundRow,
    ScoreSurvey,
    score_thresholds,
    survey_scores,
)
from selectmoe.scoring.calibration import load_calibration
from selectmoe.selection.finished_rule import rule_of_run, scored_folder
from selectmoe.selection.passes import shard_groups
from selectmoe.selection.run_folder import RunFolder

REPORT_NAME = "report.html"
MOST_SCORE_BINS = 48
OpenScorer = Callable[[dict[str, Any]], ScoreTexts]
"""Opens what scores tokens as the run with this manifest did; may raise SelectMoeError."""
OUTSIDE = 0.002  # share of the rows beyond either end of the axis of scores


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """The file, and what it took."""

    file: Path
    seconds: float


def write_report(
    run: Path,
    *,
    open_scorer: OpenScorer | None,
    map_items: MapItems = map_in_threads,
) -> WrittenReport:
    """Writes `report.html` into the folder of a finished run, whole or not at all.

    open_scorer: None where no tokens are to be scored.
    Raises ConfigError without matplotlib, DataError where files of the run are missing.
    """
    started = time.perf_counter()
    require_matplotlib()
    output = RunFolder(run)
    manifest = _read_manifest(output)
    folder = scored_run(output, manifest)
    rule = rule_of_run(manifest, folder, map_items)
    sample = read_sample(folder, rule)
    scores = [threshold.score for threshold in score_thresholds(rule).values()]
    edges = score_edges(sample, scores)
    survey = ScoreSurvey.total(
        map_items(partial(survey_scores, rule, edges), shard_groups(folder.scored_shards())),
        num_bins=len(edges) - 1,
    )
    found = survey.examples | {"disagreements": disagreements(sample)}
    examples, why_no_tokens = _examples(folder, found, open_scorer)
    content = ReportContent(
        run=run,
        manifest=manifest,
        score_figures=[
            figures.score_figure(survey, edges, scores),
            figures.score_by_length_figure(sample),
            *figures.signal_figures(sample),
        ],
        share_figures=[
            figures.source_figure(manifest["datasets"]),
            figures.length_figure(survey),
            *figures.text_figures(count_pool_texts(folder), count_kept_texts(output)),
        ],
        examples=examples,
        why_no_tokens=why_no_tokens,
        duplicates=read_duplicates(folder),
        calibration=load_calibration(folder.root),
    )
    page = render(content, started=started)
    file = run / REPORT_NAME
    with whole_file(file) as target:
        target.write(page.encode("utf-8", "replace"))
    return WrittenReport(file, time.perf_counter() - started)


def _examples(
    folder: RunFolder, found: Mapping[str, Sequence[FoundRow]], open_scorer: OpenScorer | None
) -> tuple[dict[str, list[Example]], str]:
    """The example rows, and why their tokens have no scores; empty where they have."""
    why = "the report was made without them"
    if open_scorer is not None:
        try:
            scorer = open_scorer(folder.read_manifest())
            return read_examples(folder, found, scorer), ""
        except SelectMoeError as error:
            why = " ".join(str(error).split())
            logger.info("report.html has no scores of tokens: %s", why)
    return read_examples(folder, found, None), why


def scored_run(output: RunFolder, manifest: dict[str, Any]) -> RunFolder:
    """The run that has scored, which is another one for a selection from stored scores.

    Raises DataError where its files are missing.
    """
    folder = scored_folder(output, manifest)
    if not folder.scored_shards() or not folder.corpus_shards():
        raise DataError(f"{folder.root}: a report needs the folders corpus and scored of the run")
    if not output.selected_data.is_file():
        raise DataError(f"{output.selected_data}: a report needs the selected rows")
    return folder


def score_edges(sample: RowSample, thresholds: Sequence[float]) -> np.ndarray:
    """Edges of the bins of scores: nearly all rows and all thresholds; float64, in [0, 1].

    The first threshold is an edge, so that a bar is kept or dropped as a whole.
    """
    ends = np.quantile(sample.scores.astype(np.float64), [OUTSIDE, 1 - OUTSIDE])
    low, high = min(*ends, *thresholds), max(*ends, *thresholds)
    width = max((high - low) / MOST_SCORE_BINS, 1e-5)
    first = thresholds[0] if thresholds else low
    below, above = (np.arange(1, np.ceil(room / width) + 1) for room in (first - low, high - first))
    edges = np.concatenate([first - width * below[::-1], [first], first + width * above])
    edges = np.clip(edges, 0.0, 1.0)
    return np.unique(edges if len(edges) > 1 else np.append(edges, first + width))


def _read_manifest(output: RunFolder) -> dict[str, Any]:
    if not output.manifest.is_file():
        raise DataError(f"{output.root}: a report needs a finished run, with its manifest.json")
    manifest = output.read_manifest()
    if "thresholds" not in manifest:
        raise DataError(f"{output.manifest}: not the manifest of a selection")
    return manifest
