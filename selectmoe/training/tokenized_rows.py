"""Conversations as token ids and answer masks on disk: tokenized once, read by every worker and by
a resumed run.

<run>/tokenized/rows.parquet    one line per row to learn from: the sample and its tokens
<run>/tokenized/summary.json    written last: the rows are complete
<run>/rejected/rejected.jsonl   the other rows, each with its reason
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from selectmoe.corpus.shards import SHARD_SCHEMA, row_key, shard_table
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.rejected import (
    NO_ANSWER_TOKEN,
    describe,
    refuse_cut_answer,
    reject,
    require_few_rejected,
    write_rejected,
)
from selectmoe.data.writers import whole_file, write_json
from selectmoe.errors import DataError
from selectmoe.model.checkpoint import read_model_config
from selectmoe.model.vocabulary import require_tokenizer_fits
from selectmoe.records import RejectedRow, Sample, TokenizedSample, UnscoredSample

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 512
# Large lists: their offsets have 64 bits, and a corpus may have over 2**31 tokens.
TOKENS_SCHEMA = pa.schema(
    [("token_ids", pa.large_list(pa.int32())), ("answer_mask", pa.large_list(pa.bool_()))]
)
ROWS_SCHEMA = pa.schema([*SHARD_SCHEMA, *TOKENS_SCHEMA])
Progress = Callable[[int, int | None], None]
"""Told how many rows are done, and of how many where that is known, as it is at the end."""


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Rows that can be read any number of times."""

    read: Callable[[], Iterator[Sample | RejectedRow]]
    num_rows: int | None  # None where they were not counted
    description: str  # "76 of 380 rows at random"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsToTokenize:
    """What a stage learns from."""

    choose: Callable[[], ChosenRows]  # called only where the rows are not on disk yet
    settings: Mapping[str, object]  # that decide which rows these are, for the fingerprint
    max_rejected: float
    full_sequence: bool = False  # every token is a label, not those of the assistant alone


@dataclass(frozen=True, slots=True)
class TokenizedSummary:
    """What became of the rows that were chosen: num_read = num_rows + the sum of num_rejected."""

    fingerprint: str  # of the settings and the tokenizer that made the rows
    description: str
    num_read: int
    num_rejected: dict[str, int]  # by reason
    num_rows: int
    num_truncated: int  # rows longer than the maximum sequence length
    num_tokens: int
    num_answer_tokens: int
    max_tokens: int  # of the longest row
    rows_sha256: str  # of all token ids and masks, in their order


class TokenizedRows:
    """The token ids and answer masks of a run, in memory."""

    def __init__(self, run: Path) -> None:
        summary = read_summary(run)
        assert summary is not None, run
        self.summary = summary
        table = pq.read_table(rows_file(run), columns=["id", *TOKENS_SCHEMA.names])
        tokens, masks = (table[name].combine_chunks() for name in TOKENS_SCHEMA.names)
        self.sample_ids = table["id"]
        self.starts: np.ndarray = tokens.offsets.to_numpy()
        self.token_ids: np.ndarray = tokens.values.to_numpy()
        self.answer_mask: np.ndarray = masks.values.to_numpy(zero_copy_only=False)
        self.lengths: np.ndarray = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> TokenizedSample:
        tokens = slice(self.starts[number], self.starts[number + 1])
        return TokenizedSample(
            sample_id=self.sample_ids[number].as_py(),
            token_ids=self.token_ids[tokens],
            answer_mask=self.answer_mask[tokens],
            truncated=False,  # counted when it was tokenized
        )


def rows_file(run: Path) -> Path:
    """A shard of the corpus, as `corpus.shards` reads it, with two more columns."""
    return run / "tokenized" / "rows.parquet"


def read_summary(run: Path) -> TokenizedSummary | None:
    """The summary of rows that are complete; None where they are not."""
    file = _summary_file(run)
    return TokenizedSummary(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def prepare_rows(
    rows: RowsToTokenize, chat: ChatTokenizer, run: Path, *, on_progress: Progress | None = None
) -> TokenizedSummary:
    """Tokenizes the rows into the folder of a run, unless they are there already.

    Raises DataError where there is no row, and TooManyRejectedError where too many are rejected.
    """
    fingerprint = fingerprint_of(rows, chat)
    summary = read_summary(run)
    if summary is not None and summary.fingerprint == fingerprint:
        logger.info("%s rows are tokenized already", f"{summary.num_rows:,}")
        return summary
    chosen = rows.choose()
    rows_file(run).parent.mkdir(parents=True, exist_ok=True)
    _summary_file(run).unlink(missing_ok=True)
    counter = _RowCounter(chat, full_sequence=rows.full_sequence)
    samples = _with_progress(chosen, on_progress) if on_progress else chosen.read()
    with whole_file(rows_file(run)) as file, pq.ParquetWriter(file, ROWS_SCHEMA) as writer:
        while block := list(itertools.islice(samples, ROWS_PER_BLOCK)):
            writer.write_table(counter.table(block))
    write_rejected(counter.rejected, run)
    summary = counter.summary(fingerprint, chosen.description)
    if not summary.num_read:
        raise DataError(f"nothing to train on: {chosen.description}: there are none")
    require_few_rejected(
        num_rejected=len(counter.rejected),
        num_read=summary.num_read,
        max_rejected=rows.max_rejected,
        run=run,
        first=describe(counter.rejected[0]) if counter.rejected else "",
    )
    write_json(_summary_file(run), dataclasses.asdict(summary))
    return summary


def chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: str, *, max_sequence_length: int
) -> ChatTokenizer:
    """The tokenizer, with a maximum sequence length within the positions that the model has.

    Raises ModelError where the model does not embed all of its tokens.
    """
    settings = read_model_config(model)
    positions, vocab_size = settings.get("max_position_embeddings"), settings.get("vocab_size")
    if isinstance(vocab_size, int):  # a multimodal model has it elsewhere
        require_tokenizer_fits(model, tokenizer, vocab_size)
    if isinstance(positions, int):
        max_sequence_length = min(max_sequence_length, positions)
    return ChatTokenizer(tokenizer, max_sequence_length=max_sequence_length)


def fingerprint_of(rows: RowsToTokenize, chat: ChatTokenizer) -> str:
    """A hash of all that decides which token ids the rows become, but the data itself."""
    parts = (
        dict(rows.settings),
        rows.full_sequence,
        chat.max_sequence_length,
        chat.template,
        chat.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _summary_file(run: Path) -> Path:
    return rows_file(run).with_name("summary.json")


class _RowCounter:
    """Tokenizes one block after the other and counts what becomes of the rows."""

    def __init__(self, chat: ChatTokenizer, *, full_sequence: bool) -> None:
        self.chat = chat
        self.full_sequence = full_sequence
        self.rejected: list[RejectedRow] = []
        self.num_rows = self.num_truncated = self.num_tokens = self.num_answer_tokens = 0
        self.max_tokens = 0
        self.digest = hashlib.sha256()

    def table(self, block: Sequence[Sample | RejectedRow]) -> pa.Table:
        self.rejected += [row for row in block if isinstance(row, RejectedRow)]
        samples = [row for row in block if isinstance(row, Sample)]
        kept = []
        for sample, outcome in zip(samples, self.chat.tokenize_each(samples), strict=True):
            refusal = self._refusal(outcome)
            if refusal is not None:
                self.rejected.append(reject(refusal, dataset=sample.dataset, source=sample.source))
            elif isinstance(outcome, TokenizedSample):
                kept.append((sample, outcome))
                self._count(outcome)
        table = shard_table([(row_key(sample), sample) for sample, _ in kept])
        columns = (
            _lists([row.token_ids for _, row in kept], pa.int32()),
            _lists([row.answer_mask for _, row in kept], pa.bool_()),
        )
        return pa.Table.from_arrays([*table.columns, *columns], schema=ROWS_SCHEMA)

    def summary(self, fingerprint: str, description: str) -> TokenizedSummary:
        return TokenizedSummary(
            fingerprint=fingerprint,
            description=description,
            num_read=self.num_rows + len(self.rejected),
            num_rejected=dict(Counter(row.reason for row in self.rejected)),
            num_rows=self.num_rows,
            num_truncated=self.num_truncated,
            num_tokens=self.num_tokens,
            num_answer_tokens=self.num_answer_tokens,
            max_tokens=self.max_tokens,
            rows_sha256=self.digest.hexdigest(),
        )

    def _refusal(self, outcome: TokenizedSample | UnscoredSample) -> UnscoredSample | None:
        """Why nothing can be learned from a row: no token with another before it is a label."""
        if isinstance(outcome, UnscoredSample):
            return outcome
        labels = outcome.answer_mask[1:] | self.full_sequence
        if labels.any():
            return None
        refused = refuse_cut_answer(outcome)
        if isinstance(refused, UnscoredSample):
            return refused
        return UnscoredSample(outcome.sample_id, "no_answer_token", NO_ANSWER_TOKEN)

    def _count(self, row: TokenizedSample) -> None:
        self.num_rows += 1
        self.num_truncated += row.truncated
        self.num_tokens += len(row.token_ids)
        self.num_answer_tokens += int(row.answer_mask.sum())
        self.max_tokens = max(self.max_tokens, len(row.token_ids))
        self.digest.update(row.token_ids.tobytes())
        self.digest.update(row.answer_mask.tobytes())


def _lists(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    ends = itertools.accumulate((len(row) for row in rows), initial=0)
    flat = np.concatenate(rows) if rows else np.empty(0)
    return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(flat, kind))


def _with_progress(chosen: ChosenRows, on_progress: Progress) -> Iterator[Sample | RejectedRow]:
    num_done = 0
    for num_done, row in enumerate(chosen.read(), start=1):
        if num_done % ROWS_PER_BLOCK == 0:
            on_progress(num_done, chosen.num_rows)
        yield row
    on_progress(num_done, num_done)
