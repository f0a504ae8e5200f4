"""From the scores of a run to its outputs: exactly k rows kept, every other one accounted for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from selectmoe.calibration import Calibration, load_calibration
from selectmoe.data.shards import read_shard
from selectmoe.data.writers import write_jsonl
from selectmoe.errors import TooManyRejectedError
from selectmoe.scored_shards import RunFolder, ScoreBlock, score_blocks
from selectmoe.selection import Cut, find_cut, num_to_keep

ALL_DATASETS = "*"
NUM_QUANTILE_BINS = 10_000
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
    scored, histogram = count_scores(folder)
    num_scored = scored["rows"]
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
        folder, num_scored, selection_percentage=selection_percentage, per_dataset=per_dataset
    )
    num_selected: Counter[str] = Counter()
    calibration = load_calibration(folder.root)
    rows = selected_rows(folder, cuts, num_selected, calibration)
    write_jsonl(output / "selected_data.jsonl", rows)
    counts = {
        dataset: DatasetCounts(
            num_read=num_scored[dataset] + sum(num_rejected.get(dataset, Counter()).values()),
            num_scored=num_scored[dataset],
            num_rejected=dict(num_rejected.get(dataset, Counter())),
            num_selected=num_selected[dataset],
            num_tokens=scored["tokens"][dataset],
            num_truncated=scored["truncated"][dataset],
        )
        for dataset in sorted({*num_scored, *num_rejected})
    }
    return SelectedData(counts, cuts, quantiles(histogram), calibration)


def find_cuts(
    folder: RunFolder,
    num_scored: Counter[str],
    *,
    selection_percentage: float,
    per_dataset: bool,
) -> dict[str, Cut]:
    """One cut for the whole corpus under "*", or one for each data set."""
    sizes = dict(num_scored) if per_dataset else {ALL_DATASETS: num_scored.total()}
    cuts = {}
    for dataset, size in sorted(sizes.items()):

        def blocks(dataset: str = dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for block in score_blocks(folder):
                mask = belongs_to(block, dataset)
                yield block.scores[mask], block.row_keys[mask]

        if size:
            cuts[dataset] = find_cut(blocks, num_kept=num_to_keep(size, selection_percentage))
    return cuts


def selected_rows(
    folder: RunFolder,
    cuts: dict[str, Cut],
    num_selected: Counter[str],
    calibration: Calibration | None,
) -> Iterator[dict[str, object]]:
    """The kept samples with their scores and percentiles (null without a calibration); counts them
    by data set on the way."""
    for block in score_blocks(folder):
        kept = np.zeros(len(block.scores), dtype=bool)
        for dataset, cut in cuts.items():
            kept |= belongs_to(block, dataset) & cut.keeps(block.scores, block.row_keys)
        if not kept.any():
            continue
        rows = read_shard(folder.corpus / block.shard.name)
        row_numbers, scores = block.row_numbers[kept], block.scores[kept]
        percentiles = calibration.percentiles(scores).tolist() if calibration else repeat(None)
        for row_number, score, percentile in zip(row_numbers, scores, percentiles, strict=False):
            _, sample = rows[row_number]
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
        table = pq.read_table(shard, columns=["dataset", "id", "source", "reason", "detail"])
        for row in table.filter(table["reason"].is_valid()).to_pylist():
            file, _, number = row.pop("source").rpartition(":")
            yield {"file": file, "row": int(number or 0), **row}


def belongs_to(block: ScoreBlock, dataset: str) -> np.ndarray:
    if dataset == ALL_DATASETS:
        return np.ones(len(block.scores), dtype=bool)
    mask: np.ndarray = block.datasets == dataset
    return mask


def count_scores(folder: RunFolder) -> tuple[dict[str, Counter[str]], np.ndarray]:
    """Scored "rows", their "tokens" and the "truncated" ones, each by data set, and the histogram
    of all scores over (0, 1)."""
    counts: dict[str, Counter[str]] = {
        "rows": Counter(),
        "tokens": Counter(),
        "truncated": Counter(),
    }
    histogram = np.zeros(NUM_QUANTILE_BINS, dtype=np.int64)
    for block in score_blocks(folder):
        names, codes = np.unique(block.datasets, return_inverse=True)
        for key, weights in (
            ("rows", np.ones(len(codes))),
            ("tokens", block.num_tokens),
            ("truncated", block.truncated),
        ):
            sums = np.bincount(codes, weights=weights, minlength=len(names)).astype(np.int64)
            counts[key].update(dict(zip(names.tolist(), sums.tolist(), strict=True)))
        bins = np.clip(
            (block.scores * NUM_QUANTILE_BINS).astype(np.int64), 0, NUM_QUANTILE_BINS - 1
        )
        histogram += np.bincount(bins, minlength=NUM_QUANTILE_BINS)
    return counts, histogram


def quantiles(histogram: np.ndarray) -> dict[str, float]:
    """Upper edges of the bins in which the quantiles lie."""
    if not histogram.any():
        return {}
    shares = np.cumsum(histogram) / histogram.sum()
    return {
        f"{quantile:g}": (int(np.searchsorted(shares, quantile)) + 1) / NUM_QUANTILE_BINS
        for quantile in QUANTILES
    }
