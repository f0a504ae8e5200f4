"""From the scores of a run to its outputs: exactly k rows kept, every other one accounted for."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from selectmoe.corpus.map_items import MapItems, map_in_threads
from selectmoe.corpus.shards import read_rows
from selectmoe.data.writers import whole_file, write_jsonl
from selectmoe.errors import TooManyRejectedError
from selectmoe.scoring.calibration import Calibration, load_calibration
from selectmoe.selection.passes import ALL_DATASETS as ALL_DATASETS
from selectmoe.selection.passes import (
    NUM_QUANTILE_BINS,
    Survey,
    find_cuts,
    kept_rows,
    shard_groups,
    survey,
)
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.top_k import Cut

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class DatasetCounts:
    """The rows of one data set: num_read = num_scored + the sum of num_rejected."""

    num_read: int
    num_scored: int
    num_rejected: dict[str, int]  # by reason
    num_selected: int
    num_tokens: int  # that the model read
    num_truncated: int  # rows that were scored on their beginning


@dataclass(frozen=True, slots=True)
class SelectedData:
    """What a cut kept."""

    counts: dict[str, DatasetCounts]  # by data set
    cuts: dict[str, Cut]  # by data set, or one under "*"
    quantiles: dict[str, float]  # of all scores, to 1 / NUM_QUANTILE_BINS
    calibration: Calibration | None  # of the run, by which scores have percentiles

    @property
    def num_selected(self) -> int:
        return sum(counts.num_selected for counts in self.counts.values())


def cut_run(
    folder: RunFolder,
    output: Path,
    *,
    selection_percentage: float,
    per_dataset: bool,
    max_rejected: float = 1.0,
    map_items: MapItems = map_in_threads,
) -> SelectedData:
    """Writes `selected_data.jsonl` and `rejected/rejected.jsonl` into `output`.

    Exactly max(1, floor(selection_percentage * rows scored)) rows are kept, of the corpus or of
    each data set. The rows keep the order of their keys, which is the order of the shards: a
    fixed shuffle that no splitting of the corpus into files changes.
    Raises TooManyRejectedError, with the rejected rows written and nothing selected, when more
    than the share `max_rejected` of the rows has no score.
    """
    num_rejected: dict[str, Counter[str]] = {}
    rejected_file = write_rejected(folder, output, num_rejected)
    groups = shard_groups(folder.scored_shards())
    found = Survey.total(map_items(survey, groups))
    num_scored = found.num_rows
    total_rejected = sum(reasons.total() for reasons in num_rejected.values())
    total_read = num_scored.total() + total_rejected
    if total_rejected > max_rejected * total_read:
        raise TooManyRejectedError(
            f"{total_rejected} of {total_read} rows are rejected, more than "
            f"max_rejected={max_rejected:g} allows; each with its reason: {rejected_file}"
        )
    if not num_scored:
        raise TooManyRejectedError(f"no row has a score; each with its reason: {rejected_file}")
    cuts = find_cuts(
        groups,
        found.first_digits,
        selection_percentage=selection_percentage,
        per_dataset=per_dataset,
        map_items=map_items,
    )
    calibration = load_calibration(folder.root)
    pieces = output / "pieces"
    shutil.rmtree(pieces, ignore_errors=True)  # of a run that was killed
    pieces.mkdir()
    try:
        write = partial(write_piece, folder, pieces, cuts, calibration)
        num_selected = join_pieces(map_items(write, groups), output / "selected_data.jsonl")
    finally:
        shutil.rmtree(pieces, ignore_errors=True)
    counts = {
        dataset: DatasetCounts(
            num_read=num_scored[dataset] + sum(num_rejected.get(dataset, Counter()).values()),
            num_scored=num_scored[dataset],
            num_rejected=dict(num_rejected.get(dataset, Counter())),
            num_selected=num_selected[dataset],
            num_tokens=found.num_tokens[dataset],
            num_truncated=found.num_truncated[dataset],
        )
        for dataset in sorted({*num_scored, *num_rejected})
    }
    return SelectedData(counts, cuts, quantiles(found.quantile_bins), calibration)


@dataclass(frozen=True, slots=True)
class SelectedPiece:
    """The kept rows of consecutive shards, in a file of their own."""

    first_shard: str
    file: Path
    num_selected: Counter[str]  # by data set


def write_piece(
    folder: RunFolder,
    pieces: Path,
    cuts: Mapping[str, Cut],
    calibration: Calibration | None,
    shards: Sequence[Path],
) -> SelectedPiece:
    """A pass: reads the texts that the cuts keep, and writes them into `pieces`."""
    num_selected: Counter[str] = Counter()
    file = pieces / f"{shards[0].stem}.jsonl"
    write_jsonl(file, selected_rows(folder, shards, cuts, num_selected, calibration))
    return SelectedPiece(shards[0].name, file, num_selected)


def join_pieces(pieces: Iterable[SelectedPiece], path: Path) -> Counter[str]:
    """Writes the pieces, which may come in any order, in that of their shards, and counts rows."""
    num_selected: Counter[str] = Counter()
    with whole_file(path) as target:
        for piece in sorted(pieces, key=lambda piece: piece.first_shard):
            num_selected.update(piece.num_selected)
            with piece.file.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    return num_selected


def selected_rows(
    folder: RunFolder,
    shards: Iterable[Path],
    cuts: Mapping[str, Cut],
    num_selected: Counter[str],
    calibration: Calibration | None,
) -> Iterator[dict[str, object]]:
    """The kept samples of some scored shards, with their scores and percentiles (null without a
    calibration); counts them by data set on the way."""
    for shard in shards:
        row_numbers, scores = kept_rows(cuts, shard)
        if not len(row_numbers):
            continue
        samples = read_rows(folder.corpus / shard.name, row_numbers)
        percentiles = calibration.percentiles(scores).tolist() if calibration else repeat(None)
        for sample, score, percentile in zip(samples, scores, percentiles, strict=False):
            num_selected[sample.dataset] += 1
            yield {
                "dataset": sample.dataset,
                "id": sample.sample_id,
                "messages": [{"role": m.role, "content": m.content} for m in sample.messages],
                "score": float(str(score)),  # the shortest decimal that is this float32
                "percentile": percentile,
            }


def write_rejected(folder: RunFolder, output: Path, num_rejected: dict[str, Counter[str]]) -> Path:
    """Writes `rejected/rejected.jsonl`; counts by data set and reason in `num_rejected`."""
    file = output / "rejected" / "rejected.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_jsonl(file, rejected_rows(folder, num_rejected))
    return file


def rejected_rows(
    folder: RunFolder, num_rejected: dict[str, Counter[str]]
) -> Iterator[dict[str, object]]:
    """Rows that broke the input contract, then samples without a score; counts them on the way."""
    for row in _unread_and_unscored(folder):
        num_rejected.setdefault(str(row["dataset"]), Counter())[str(row["reason"])] += 1
        yield row


def _unread_and_unscored(folder: RunFolder) -> Iterator[dict[str, object]]:
    columns = ["file", "row", "dataset", "sample_id", "reason", "detail"]
    for batch in pq.ParquetFile(folder.corpus / "rejected.parquet").iter_batches(columns=columns):
        for row in batch.to_pylist():
            row["id"] = row.pop("sample_id")
            yield row
    for shard in folder.scored_shards():
        for row in _unscored(shard):
            file, _, number = row.pop("source").rpartition(":")
            yield {"file": file, "row": int(number or 0), **row}


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
