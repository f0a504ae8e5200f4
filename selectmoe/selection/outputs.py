"""Writes the outputs of a selection: exactly k selected rows, and every rejected row."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.corpus.normalize import REJECTED_NAME
from selectmoe.corpus.shards import CorpusSummary, read_rows, read_summary
from selectmoe.data.layouts import SYSTEM_COLUMNS, TOOLS_COLUMN
from selectmoe.data.message_fields import as_json
from selectmoe.data.rejected import (
    RejectedCounts,
    reject,
    require_few_rejected,
    write_rejected,
)
from selectmoe.data.writers import whole_file, write_jsonl
from selectmoe.records import RejectedRow, Sample, UnscoredSample
from selectmoe.scoring.calibration import Calibration, load_calibration
from selectmoe.selection.differences import MedianTokens, median_of_counts, sum_of_counts
from selectmoe.selection.fates import write_fates
from selectmoe.selection.keep_rule import KeepRule, kept_rows
from selectmoe.selection.passes import NUM_QUANTILE_BINS, Survey, Thresholds, count_values
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.strategies import ChosenRule, choose_rows, survey_scored

READ_BESIDE = (*SYSTEM_COLUMNS, TOOLS_COLUMN)
"""Columns beside the messages that a reader of selected_data.jsonl takes for a part of them."""
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class DatasetCounts:
    """The rows of one dataset: num_read = num_scored + num_left_out + the sum of num_rejected."""

    num_read: int
    num_scored: int
    num_rejected: dict[str, int]  # by reason
    num_duplicates: int  # rows with the text of another one
    num_left_out: int  # of these, the rows that were not scored: all or none
    num_selected: int
    num_tokens: int  # that the model read
    num_truncated: int  # rows that were scored on their beginning


@dataclass(frozen=True, slots=True)
class SelectedData:
    """What a selection kept."""

    counts: dict[str, DatasetCounts]  # by dataset
    chosen: ChosenRule
    quantiles: dict[str, float]  # of all scores, to 1 / NUM_QUANTILE_BINS
    median_answer_tokens: MedianTokens
    num_answer_tokens: dict[str, int]  # of the scored and of the selected rows
    calibration: Calibration | None  # of the run, by which scores have percentiles
    files: dict[str, Any]  # how many were read, and what of the folders was not

    @property
    def num_selected(self) -> int:
        return sum(counts.num_selected for counts in self.counts.values())

    @property
    def thresholds(self) -> Thresholds:
        """One per dataset, or a single one of the corpus, in the order of the strategy."""
        return self.chosen.rule.thresholds


def select_rows(
    folder: RunFolder,
    output: RunFolder,
    config: SelectConfig,
    *,
    map_items: MapItems = map_in_threads,
) -> SelectedData:
    """Writes `selected_data.jsonl` and `rejected/rejected.jsonl` into `output`.

    Which rows are kept, `choose_rows` says. They keep the order of their keys, which is the order
    of the shards: a fixed shuffle that does not depend on how the corpus was split into files.
    Raises TooManyRejectedError, with the rejected rows written and nothing selected, where more
    than the share `config.max_rejected` of the rows has no score.
    """
    num_rejected = write_rejected_rows(folder, output)
    summary = read_summary(folder.corpus)
    scored = survey_scored(folder, map_items)
    found = scored.survey
    total_rejected = sum(reasons.total() for reasons in num_rejected.values())
    require_few_rejected(
        num_rejected=total_rejected,
        num_read=found.num_rows.total() + total_rejected + (summary.num_left_out if summary else 0),
        max_rejected=config.max_rejected,
        run=output.root,
    )
    chosen = choose_rows(config, scored)
    calibration = load_calibration(folder.root)
    folders = summary.files.get("folders", []) if summary else []
    write = partial(write_piece, folder, output.pieces, chosen.rule, calibration, folders)
    kept = _write_selected(output, map_items(write, scored.groups))
    shutil.rmtree(output.fates, ignore_errors=True)  # of a run that was killed
    if config.selection.write_fates:
        output.fates.mkdir()
        for _ in map_items(partial(write_fates, chosen.rule, output.fates), scored.groups):
            pass
    return SelectedData(
        counts=_counts(found, num_rejected, kept.num_rows, summary),
        chosen=chosen,
        quantiles=quantiles(found.quantile_bins),
        median_answer_tokens=MedianTokens(
            scored=median_of_counts(found.answer_tokens),
            selected=median_of_counts(kept.answer_tokens),
        ),
        num_answer_tokens={
            "scored": sum_of_counts(found.answer_tokens),
            "selected": sum_of_counts(kept.answer_tokens),
        },
        calibration=calibration,
        files=summary.files if summary else {},
    )


def _write_selected(output: RunFolder, pieces: Iterable["SelectedPiece"]) -> "KeptCounts":
    """pieces: are written as they are asked for."""
    shutil.rmtree(output.pieces, ignore_errors=True)  # of a run that was killed
    output.pieces.mkdir()
    try:
        return join_pieces(pieces, output.selected_data)
    finally:
        shutil.rmtree(output.pieces, ignore_errors=True)


def _counts(
    found: Survey,
    num_rejected: RejectedCounts,
    num_selected: Counter[str],
    summary: CorpusSummary | None,
) -> dict[str, DatasetCounts]:
    duplicates = summary.duplicates_by_dataset if summary else {}
    left_out = Counter(duplicates if summary and summary.num_left_out else {})
    return {
        dataset: DatasetCounts(
            num_read=found.num_rows[dataset]
            + left_out[dataset]
            + sum(num_rejected.get(dataset, {}).values()),
            num_scored=found.num_rows[dataset],
            num_rejected=dict(num_rejected.get(dataset, {})),
            num_duplicates=duplicates.get(dataset, 0),
            num_left_out=left_out[dataset],
            num_selected=num_selected[dataset],
            num_tokens=found.num_tokens[dataset],
            num_truncated=found.num_truncated[dataset],
        )
        for dataset in sorted({*found.num_rows, *num_rejected, *left_out})
    }


@dataclass(frozen=True, slots=True)
class KeptCounts:
    """Numbers of kept rows."""

    num_rows: Counter[str] = field(default_factory=Counter)  # by dataset
    answer_tokens: Counter[int] = field(default_factory=Counter)  # by number of answer tokens

    def add(self, other: "KeptCounts") -> None:
        self.num_rows.update(other.num_rows)
        self.answer_tokens.update(other.answer_tokens)


@dataclass(frozen=True, slots=True)
class SelectedPiece:
    """The kept rows of consecutive shards, in a file of their own."""

    first_shard: str
    file: Path
    counts: KeptCounts


def write_piece(
    folder: RunFolder,
    pieces: Path,
    rule: KeepRule,
    calibration: Calibration | None,
    folders: Sequence[str],
    shards: Sequence[Path],
) -> SelectedPiece:
    """A pass: reads the texts that are kept, and writes them into `pieces`.

    folders: left out of the paths of files, so that a copy of a corpus gives the same rows.
    """
    counts = KeptCounts()
    file = pieces / f"{shards[0].stem}.jsonl"
    write_jsonl(file, selected_rows(folder, shards, rule, counts, calibration, folders))
    return SelectedPiece(shards[0].name, file, counts)


def join_pieces(pieces: Iterable[SelectedPiece], path: Path) -> KeptCounts:
    """Writes the pieces, which may come in any order, in that of their shards, and adds up their
    counts."""
    counts = KeptCounts()
    with whole_file(path) as target:
        for piece in sorted(pieces, key=lambda piece: piece.first_shard):
            counts.add(piece.counts)
            with piece.file.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    return counts


def selected_rows(
    folder: RunFolder,
    shards: Iterable[Path],
    rule: KeepRule,
    counts: KeptCounts,
    calibration: Calibration | None,
    folders: Sequence[str],
) -> Iterator[dict[str, object]]:
    """The kept samples of some scored shards, with their scores and percentiles (null without a
    calibration); counts them on the way."""
    for shard in shards:
        kept = kept_rows(rule, shard)
        if not len(kept.row_numbers):
            continue
        counts.answer_tokens.update(count_values(kept.num_answer_tokens))
        samples = read_rows(folder.corpus / shard.name, kept.row_numbers)
        percentiles = calibration.percentiles(kept.scores).tolist() if calibration else repeat(None)
        for sample, score, percentile in zip(samples, kept.scores, percentiles, strict=False):
            counts.num_rows[sample.dataset] += 1
            yield _selected_row(sample, score, percentile, shorten_source(sample.source, folders))


def _selected_row(
    sample: Sample, score: np.float32, percentile: float | None, source: str
) -> dict[str, object]:
    row: dict[str, object] = {
        "dataset": sample.dataset,
        "id": sample.sample_id,
        "messages": [as_json(message) for message in sample.messages],
        "score": float(str(score)),  # the shortest decimal that is this float32
        "percentile": percentile,
        "source": source,
    }
    if sample.tools:
        row["tools"] = json.loads(sample.tools)
    if sample.extra_columns:
        row |= _with_free_names(json.loads(sample.extra_columns), taken={*row, *READ_BESIDE})
    return row


def _with_free_names(columns: Mapping[str, object], *, taken: set[str]) -> dict[str, object]:
    """The corpus's own `score` becomes `corpus_score`, as does what would be read as a turn."""
    named: dict[str, object] = {}
    for name, value in columns.items():
        free = name
        while free in taken or (free != name and free in columns):
            free = f"corpus_{free}"
        named[free] = value
    return named


def shorten_source(source: str, folders: Sequence[str]) -> str:
    """The source of a row, "<file>:<row>", without the folder in which the corpus lies."""
    folder = next((folder for folder in folders if source.startswith(folder)), "")
    return source.removeprefix(folder)


def write_rejected_rows(folder: RunFolder, output: RunFolder) -> RejectedCounts:
    """Rows that broke the input contract, then samples without a score."""
    return write_rejected(_rejected_rows(folder), output.root)


def _rejected_rows(folder: RunFolder) -> Iterator[RejectedRow]:
    with pq.ParquetFile(folder.corpus / REJECTED_NAME) as file:
        for batch in file.iter_batches():
            yield from (RejectedRow(**row) for row in batch.to_pylist())
    for shard in folder.scored_shards():
        for row in _unscored(shard):
            refused = UnscoredSample(row["id"], row["reason"], row["detail"])
            yield reject(refused, dataset=row["dataset"], source=row["source"])


def _unscored(shard: Path) -> Iterator[dict[str, Any]]:
    """Rows with a reason; row groups without any, which are most, are not read."""
    with pq.ParquetFile(shard) as file:
        reason = file.schema.names.index("reason")
        for number in range(file.num_row_groups):
            row_group = file.metadata.row_group(number)
            statistics = row_group.column(reason).statistics
            if statistics is None or statistics.null_count < row_group.num_rows:
                columns = ["dataset", "id", "source", "reason", "detail"]
                table = file.read_row_group(number, columns=columns)
                yield from table.filter(table["reason"].is_valid()).to_pylist()


def quantiles(histogram: np.ndarray) -> dict[str, float]:
    """Upper edges of the bins in which the quantiles lie."""
    if not histogram.any():
        return {}
    shares = np.cumsum(histogram) / histogram.sum()
    return {
        f"{quantile:g}": (int(np.searchsorted(shares, quantile)) + 1) / NUM_QUANTILE_BINS
        for quantile in QUANTILES
    }
