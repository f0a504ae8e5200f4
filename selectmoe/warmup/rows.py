"""The rows that a warm-up learns from: read, thinned out, tokenised once, and counted."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from selectmoe.corpus.shards import keep_subset
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.readers import read_corpora
from selectmoe.errors import TooManyRejectedError
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import RejectedRow, Sample, TokenizedSample, UnscoredSample
from selectmoe.warmup.step_batches import TrainingRows

CLEAN_DEMO = "demo"  # the demo corpus also has rows that were made worse on purpose
ROWS_PER_CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class WarmupRows:
    """What a corpus gave: rows to learn from, and those that were left out, with reasons."""

    rows: TrainingRows
    rejected: tuple[RejectedRow, ...]

    @property
    def num_read(self) -> int:
        return len(self.rows.samples) + len(self.rejected)


def read_warmup_rows(
    specs: Sequence[str],
    tokenizer: ChatTokenizer,
    *,
    subset_ratio: float,
    max_rejected: float,
    full_sequence_prediction: bool,
    on_progress: Callable[[int, int], None] = lambda num_done, num_rows: None,
) -> WarmupRows:
    """Raises TooManyRejectedError above `max_rejected`, and DataError where no row is left.

    on_progress: told how many rows are tokenised, of how many.
    """
    if specs:
        rows = read_corpora(specs)
    else:
        demo = read_corpora([str(DEMO_CORPUS)])
        rows = (row for row in demo if row.dataset == CLEAN_DEMO)
    if subset_ratio < 1:
        rows = keep_subset(rows, ratio=subset_ratio)
    found = list(rows)
    samples = [row for row in found if isinstance(row, Sample)]
    rejected = [row for row in found if isinstance(row, RejectedRow)]
    kept: list[Sample] = []
    tokenized: list[TokenizedSample] = []
    outcomes = _tokenized(samples, tokenizer, on_progress)
    for sample, outcome in zip(samples, outcomes, strict=True):
        reason = _complaint(outcome, full_sequence_prediction)
        if isinstance(outcome, TokenizedSample) and reason is None:
            kept.append(sample)
            tokenized.append(outcome)
        else:
            rejected.append(_rejected(sample, *(reason or ("", ""))))
    _require_few(rejected, len(found), max_rejected)
    return WarmupRows(TrainingRows(kept, tokenized), tuple(rejected))


def _tokenized(
    samples: Sequence[Sample],
    tokenizer: ChatTokenizer,
    on_progress: Callable[[int, int], None],
) -> Iterable[TokenizedSample | UnscoredSample]:
    for start in range(0, len(samples), ROWS_PER_CHUNK):
        yield from tokenizer.tokenize_each(samples[start : start + ROWS_PER_CHUNK])
        on_progress(min(start + ROWS_PER_CHUNK, len(samples)), len(samples))


def _complaint(
    outcome: TokenizedSample | UnscoredSample, full_sequence_prediction: bool
) -> tuple[str, str] | None:
    """Why nothing can be learned from a row: a key for programs and a sentence for people."""
    if isinstance(outcome, UnscoredSample):
        return outcome.reason, outcome.detail
    mask = outcome.answer_mask[1:]
    num_labels = len(mask) if full_sequence_prediction else int(mask.sum())
    if num_labels:
        return None
    return "no_label", (
        f"none of the {len(outcome.token_ids)} tokens that are read is the assistant's; raise "
        "dataset.max_sequence_length"
    )


def _rejected(sample: Sample, reason: str, detail: str) -> RejectedRow:
    file, _, row = sample.source.rpartition(":")
    number = int(row) if row.isdigit() else 0
    return RejectedRow(file, number, sample.dataset, sample.sample_id, reason, detail)


def _require_few(rejected: Sequence[RejectedRow], num_read: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * num_read:
        first = rejected[0]
        raise TooManyRejectedError(
            f"{len(rejected)} of {num_read} rows cannot be learned from, more than "
            f"max_rejected={max_rejected:g} allows; first: {first.file}:{first.row}: "
            f"{first.reason}: {first.detail}"
        )
