"""Conversations as token ids and answer masks on disk: tokenised once, read by every worker.

<folder>/rows.parquet     one line a row that can be learned from
<folder>/rejected.jsonl   the others, each with its reason
<folder>/summary.json     written last: the two above are whole
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selectmoe.config.finetune import FinetuneConfig
from selectmoe.data.chat import ChatTokenizer, package_template
from selectmoe.data.packing import collate_padded
from selectmoe.data.writers import whole_file, write_json, write_jsonl
from selectmoe.errors import DataError, ModelError, TooManyRejectedError, first_line
from selectmoe.finetune.sources import choose_rows
from selectmoe.model.quiet_loading import load_tokenizer, quiet_transformers
from selectmoe.paths import model_or_embedded
from selectmoe.records import RejectedRow, Sample, TokenizedSample, UnscoredSample

logger = logging.getLogger(__name__)

# Shape letters: B = rows of a batch, T = tokens of its longest row.
NOT_A_TARGET = -100  # transformers' and torch's mark for a token that no loss looks at
ROWS_PER_BLOCK = 512
ROWS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        # Large lists: their offsets have 64 bits, and a corpus may have over 2**31 tokens.
        ("token_ids", pa.large_list(pa.int32())),
        ("answer_mask", pa.large_list(pa.bool_())),
    ]
)


@dataclass(frozen=True, slots=True)
class SupervisedSummary:
    """What became of the rows that were chosen: num_read = num_rows + the sum of num_rejected."""

    fingerprint: str  # of the settings and the tokenizer that made the rows
    described: str
    num_read: int
    num_rejected: dict[str, int]  # by reason
    num_rows: int
    num_truncated: int  # of these, cut at max_sequence_length
    num_tokens: int
    num_answer_tokens: int
    max_tokens: int  # of the longest row
    rows_sha256: str  # of all token ids and masks, in their order


class SupervisedRows(Dataset[int]):
    """The rows of a folder in memory. As a data set it gives row numbers, and `batch` the rows."""

    def __init__(self, folder: Path) -> None:
        summary = read_summary(folder)
        assert summary is not None, folder
        self.summary = summary
        table = pq.read_table(folder / "rows.parquet")
        tokens, masks = (table[name].combine_chunks() for name in ("token_ids", "answer_mask"))
        self.sample_ids = table["sample_id"]
        self.starts: np.ndarray = tokens.offsets.to_numpy()
        self.token_ids: np.ndarray = tokens.values.to_numpy()
        self.answer_mask: np.ndarray = masks.values.to_numpy(zero_copy_only=False)
        self.lengths: np.ndarray = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> int:
        return number

    def sample(self, number: int) -> TokenizedSample:
        place = slice(self.starts[number], self.starts[number + 1])
        return TokenizedSample(
            sample_id=self.sample_ids[number].as_py(),
            token_ids=self.token_ids[place],
            answer_mask=self.answer_mask[place],
            truncated=False,  # counted when it was tokenised
        )

    def names(self, numbers: Iterable[int]) -> list[str]:
        """The ids of rows, as the data has them."""
        return [self.sample_ids[number].as_py() for number in numbers]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The rows padded on the right, targets on the assistant's tokens alone.

        There is no attention mask: causal attention never looks to the right, where the padding
        is, and without a mask it may use its fastest kernel.
        """
        rows = [self.sample(number) for number in numbers]
        batch = collate_padded(rows, np.arange(len(rows)))
        labels_BT = np.where(batch.answer_mask, batch.token_ids, NOT_A_TARGET)
        labels_BT[:, 0] = NOT_A_TARGET  # nothing stands before it that could predict it
        return {
            "input_ids": torch.from_numpy(batch.token_ids),
            "labels": torch.from_numpy(labels_BT),
            "row_numbers": torch.tensor(list(numbers)),
        }


class StepOrder(Sampler[int]):
    """A random order of the rows for each epoch; within one optimizer step longest first.

    Which rows make a step, and so its gradient, is left to chance alone; only their places in the
    step's batches are not, so that rows of a batch are of similar length and padding is little.
    """

    def __init__(self, lengths: np.ndarray, *, rows_per_step: int, seed: int) -> None:
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader; a resumed run asks for the epoch that it is in."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        for start in range(0, len(order), self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            yield from step[np.argsort(-self.lengths[step], kind="stable")].tolist()


def load_target_tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the target, with a chat template; of a hub name no weights are fetched.

    Raises ModelError where there is none, an unreadable one, or one without a template.
    """
    model = model_or_embedded(config.model)
    if Path(model).is_dir():
        return with_chat_template(load_tokenizer(Path(model)), config)
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        except Exception as error:  # the hub's client has many; a broken file raises a bare one
            reason = first_line(error)
            raise ModelError(f"{model}: its tokenizer cannot be had: {reason}") from error
    return with_chat_template(tokenizer, config)


def with_chat_template(
    tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template that `dataset.chat_template` names; a checkpoint has it too.

    Raises ModelError where there is none.
    """
    if config.dataset.chat_template == "selectmoe":
        tokenizer.chat_template = package_template(tokenizer)
    elif not tokenizer.chat_template:
        raise ModelError(
            f"{config.model}: its tokenizer must have a chat template, which a base model's often "
            "has not; dataset.chat_template=selectmoe uses the package's, <|user|> … <|assistant|> "
            "…, and saves it with the adapter"
        )
    return tokenizer


def prepare_rows(
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_positions: int | None = None,
    on_progress: Callable[[int, int | None], None] = lambda num_done, num_rows: None,
) -> SupervisedSummary:
    """Writes the rows of `config.dataset` into `folder`, unless they are there already.

    tokenizer: as `load_target_tokenizer` gives it. max_positions: of the model; no row may be
    longer. on_progress: told how many rows are done, and of how many where that is known, as it is
    at the end.
    Raises DataError where no row can be learned from, and TooManyRejectedError where too few can.
    """
    length = config.dataset.max_sequence_length
    assert tokenizer.chat_template
    chat = ChatTokenizer(tokenizer, max_sequence_length=min(length, max_positions or length))
    mark = fingerprint(config, chat)
    summary = read_summary(folder)
    if summary is not None and summary.fingerprint == mark:
        logger.info("%s rows are tokenised already", f"{summary.num_rows:,}")
        return summary
    chosen = choose_rows(config.dataset, seed=config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    counter = _RowCounter()
    rows = _with_progress(chosen.read(), chosen.num_rows, on_progress)
    with whole_file(folder / "rows.parquet") as file, pq.ParquetWriter(file, ROWS_SCHEMA) as writer:
        while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
            writer.write_table(counter.table(block, chat))
    write_jsonl(folder / "rejected.jsonl", map(_rejected_line, counter.rejected))
    summary = counter.summary(mark, chosen.described)
    require_enough(summary, config.max_rejected, counter.rejected, folder)
    write_json(folder / "summary.json", dataclasses.asdict(summary))
    return summary


def read_summary(folder: Path) -> SupervisedSummary | None:
    """The summary of rows that are whole; None where they are not."""
    file = folder / "summary.json"
    return SupervisedSummary(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def fingerprint(config: FinetuneConfig, chat: ChatTokenizer) -> str:
    """Of all that decides which token ids the rows become, but the data itself."""
    seed = config.seed if config.dataset.mode == "random" else None
    parts = (
        dataclasses.asdict(config.dataset),
        seed,
        chat.max_sequence_length,
        chat.template,
        chat.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def require_enough(
    summary: SupervisedSummary,
    max_rejected: float,
    rejected: Sequence[RejectedRow],
    folder: Path,
) -> None:
    """Raises where the data is not what it was taken for; every rejected row is on disk by then."""
    if not rejected and summary.num_rows:
        return
    if not summary.num_rows and not rejected:
        raise DataError(f"nothing to finetune on: {summary.described}: there is none")
    first = f"{rejected[0].file}:{rejected[0].row}: {rejected[0].detail}"
    if not summary.num_rows:
        raise DataError(
            f"nothing to finetune on: none of {summary.num_read} rows can be learned from; "
            f"first: {first}; all of them: {folder / 'rejected.jsonl'}"
        )
    if len(rejected) > max_rejected * summary.num_read:
        raise TooManyRejectedError(
            f"{len(rejected)} of {summary.num_read} rows cannot be learned from, more than "
            f"max_rejected={max_rejected:g} allows; first: {first}; all of them: "
            f"{folder / 'rejected.jsonl'}"
        )


class _RowCounter:
    """Tokenises block after block and keeps count of what becomes of the rows."""

    def __init__(self) -> None:
        self.rejected: list[RejectedRow] = []
        self.num_rows = self.num_truncated = self.num_tokens = self.num_answer_tokens = 0
        self.max_tokens = 0
        self.digest = hashlib.sha256()

    def table(self, block: Sequence[Sample | RejectedRow], chat: ChatTokenizer) -> pa.Table:
        self.rejected += [row for row in block if isinstance(row, RejectedRow)]
        samples = [row for row in block if isinstance(row, Sample)]
        kept = []
        for sample, outcome in zip(samples, chat.tokenize_each(samples), strict=True):
            if isinstance(outcome, UnscoredSample):
                self.rejected.append(_reject(sample, outcome.reason, outcome.detail))
            elif not outcome.answer_mask[1:].any():
                self.rejected.append(_reject(sample, "no_answer_token", _no_answer(outcome)))
            else:
                kept.append((sample, outcome))
                self._count(outcome)
        columns = [
            pa.array([sample.sample_id for sample, _ in kept], pa.string()),
            pa.array([sample.source for sample, _ in kept], pa.string()),
            _lists([row.token_ids for _, row in kept], pa.int32()),
            _lists([row.answer_mask for _, row in kept], pa.bool_()),
        ]
        return pa.Table.from_arrays(columns, schema=ROWS_SCHEMA)

    def summary(self, mark: str, described: str) -> SupervisedSummary:
        return SupervisedSummary(
            fingerprint=mark,
            described=described,
            num_read=self.num_rows + len(self.rejected),
            num_rejected=dict(Counter(row.reason for row in self.rejected)),
            num_rows=self.num_rows,
            num_truncated=self.num_truncated,
            num_tokens=self.num_tokens,
            num_answer_tokens=self.num_answer_tokens,
            max_tokens=self.max_tokens,
            rows_sha256=self.digest.hexdigest(),
        )

    def _count(self, row: TokenizedSample) -> None:
        self.num_rows += 1
        self.num_truncated += row.truncated
        self.num_tokens += len(row.token_ids)
        self.num_answer_tokens += int(row.answer_mask.sum())
        self.max_tokens = max(self.max_tokens, len(row.token_ids))
        self.digest.update(row.token_ids.tobytes())
        self.digest.update(row.answer_mask.tobytes())


def _no_answer(row: TokenizedSample) -> str:
    if row.truncated:
        return (
            f"its first {len(row.token_ids)} tokens, which dataset.max_sequence_length leaves, "
            "hold no word of the assistant's"
        )
    return "there is no token of the assistant's that another token could predict"


def _reject(sample: Sample, reason: str, detail: str) -> RejectedRow:
    file, _, number = sample.source.rpartition(":")
    return RejectedRow(file, int(number or 0), sample.dataset, sample.sample_id, reason, detail)


def _rejected_line(row: RejectedRow) -> dict[str, object]:
    line = dataclasses.asdict(row)
    return {"id": line.pop("sample_id"), **line}


def _lists(rows: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    ends = itertools.accumulate((len(row) for row in rows), initial=0)
    flat = np.concatenate(rows) if rows else np.empty(0)
    return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(flat, kind))


def _with_progress(
    rows: Iterable[Sample | RejectedRow],
    num_rows: int | None,
    on_progress: Callable[[int, int | None], None],
) -> Iterator[Sample | RejectedRow]:
    num_done = 0
    for num_done, row in enumerate(rows, start=1):
        if num_done % ROWS_PER_BLOCK == 0:
            on_progress(num_done, num_rows)
        yield row
    on_progress(num_done, num_done)
