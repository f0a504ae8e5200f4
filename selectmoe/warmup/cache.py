"""The rows of a warm-up on disk: read and tokenised once, for every worker and for a resumed run.

<folder>/rows.parquet    a line a row that can be learned from: the sample and its tokens
<folder>/summary.json    written last: the rows are whole
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.config.warmup import WarmupConfig
from selectmoe.corpus.shards import SHARD_SCHEMA
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.writers import whole_file, write_json, write_jsonl
from selectmoe.model.checkpoint import model_folder, read_model_config
from selectmoe.model.quiet_loading import load_tokenizer
from selectmoe.paths import model_or_embedded
from selectmoe.records import Message, Sample, TokenizedSample
from selectmoe.warmup.rows import WarmupRows, read_warmup_rows
from selectmoe.warmup.settings import corpus_specs
from selectmoe.warmup.step_batches import TrainingRows

ROWS_PER_BLOCK = 512
ROWS_NAME = "rows.parquet"
REJECTED_NAME = "rejected.jsonl"
ROWS_SCHEMA = pa.schema(
    [
        *(field for field in SHARD_SCHEMA if field.name != "row_key"),
        # Large lists: their offsets have 64 bits, and a corpus may have over 2**31 tokens.
        ("token_ids", pa.large_list(pa.int32())),
        ("answer_mask", pa.large_list(pa.bool_())),
        ("truncated", pa.bool_()),
    ]
)


@dataclasses.dataclass(frozen=True, slots=True)
class WarmupSummary:
    """What became of the rows: num_read = num_samples + num_rejected."""

    fingerprint: str  # of the settings and the tokenizer that made the rows
    num_read: int
    num_samples: int
    num_rejected: int
    num_tokens: int
    num_truncated: int
    has_chat_template: bool  # of the tokenizer; without, the package's is used, as by stage 2


def prepare_warmup_rows(
    config: WarmupConfig, output: Path, folder: Path, *, on_progress: Callable[[int, int], None]
) -> WarmupSummary:
    """Writes the rows into `folder` and the others, with reasons, into `output`; if the same rows
    are there already, does nothing.

    on_progress: told how many rows are tokenised, of how many.
    Raises what `read_warmup_rows` raises.
    """
    chat = warmup_tokenizer(config)
    mark = fingerprint(config, chat)
    summary = read_warmup_summary(folder)
    if summary is not None and summary.fingerprint == mark:
        return summary
    found = rows_of_corpus(config, chat, output, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(found.rows, folder)
    tokenized = found.rows.tokenized
    summary = WarmupSummary(
        fingerprint=mark,
        num_read=found.num_read,
        num_samples=len(tokenized),
        num_rejected=len(found.rejected),
        num_tokens=sum(len(row.token_ids) for row in tokenized),
        num_truncated=sum(row.truncated for row in tokenized),
        has_chat_template=chat.tokenizer.chat_template is not None,
    )
    write_json(folder / "summary.json", dataclasses.asdict(summary))
    return summary


def warmup_tokenizer(config: WarmupConfig) -> ChatTokenizer:
    """Of the model, with rows no longer than the model has positions for."""
    model = model_or_embedded(config.model)
    positions = read_model_config(model).get("max_position_embeddings")
    length = config.dataset.max_sequence_length
    if isinstance(positions, int):
        length = min(length, positions)
    return ChatTokenizer(load_tokenizer(model_folder(model)), max_sequence_length=length)


def read_warmup_summary(folder: Path) -> WarmupSummary | None:
    """The summary of rows that are whole; None where they are not."""
    file = folder / "summary.json"
    return WarmupSummary(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


def load_warmup_rows(folder: Path) -> WarmupRows:
    """What `prepare_warmup_rows` wrote, without the rejected rows."""
    samples: list[Sample] = []
    tokenized: list[TokenizedSample] = []
    for batch in pq.ParquetFile(folder / ROWS_NAME).iter_batches(ROWS_PER_BLOCK):
        for sample, tokens in _rows_of(batch):
            samples.append(sample)
            tokenized.append(tokens)
    return WarmupRows(TrainingRows(samples, tokenized), ())


def fingerprint(config: WarmupConfig, chat: ChatTokenizer) -> str:
    """Of all that decides which token ids the rows become, but the corpus itself."""
    parts = (
        dataclasses.asdict(config.dataset),
        config.training.full_sequence_prediction,
        chat.max_sequence_length,
        chat.template,
        chat.tokenizer.backend_tokenizer.to_str(),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def rows_of_corpus(
    config: WarmupConfig,
    chat: ChatTokenizer,
    output: Path,
    on_progress: Callable[[int, int], None] = lambda num_done, num_rows: None,
) -> WarmupRows:
    """Reads the corpus; the rows that cannot be learned from are written into `output`."""
    found = read_warmup_rows(
        corpus_specs(config.dataset),
        chat,
        subset_ratio=config.dataset.subset_ratio,
        max_rejected=config.max_rejected,
        full_sequence_prediction=config.training.full_sequence_prediction,
        on_progress=on_progress,
    )
    if found.rejected:
        output.mkdir(parents=True, exist_ok=True)
        write_jsonl(output / REJECTED_NAME, map(dataclasses.asdict, found.rejected))
    return found


def write_rows(rows: TrainingRows, folder: Path) -> None:
    (folder / "summary.json").unlink(missing_ok=True)
    with whole_file(folder / ROWS_NAME) as file, pq.ParquetWriter(file, ROWS_SCHEMA) as writer:
        for start in range(0, len(rows.samples), ROWS_PER_BLOCK):
            block = slice(start, start + ROWS_PER_BLOCK)
            writer.write_table(_table(rows.samples[block], rows.tokenized[block]))


def _table(samples: Sequence[Sample], tokenized: Sequence[TokenizedSample]) -> pa.Table:
    columns = {
        "dataset": [sample.dataset for sample in samples],
        "id": [sample.sample_id for sample in samples],
        "messages": [[dataclasses.asdict(m) for m in sample.messages] for sample in samples],
        "source": [sample.source for sample in samples],
        "token_ids": [row.token_ids for row in tokenized],
        "answer_mask": [row.answer_mask for row in tokenized],
        "truncated": [bool(row.truncated) for row in tokenized],
    }
    return pa.table(columns, schema=ROWS_SCHEMA)


def _rows_of(batch: pa.RecordBatch) -> Iterator[tuple[Sample, TokenizedSample]]:
    texts = batch.select(["dataset", "id", "messages", "source", "truncated"]).to_pylist()
    ids, masks = batch.column("token_ids"), batch.column("answer_mask")
    for number, row in enumerate(texts):
        messages = tuple(Message(**message) for message in row["messages"])
        sample = Sample(row["dataset"], row["id"], messages, row["source"])
        token_ids: np.ndarray = ids[number].values.to_numpy()
        answer_mask: np.ndarray = masks[number].values.to_numpy(zero_copy_only=False)
        yield sample, TokenizedSample(row["id"], token_ids, answer_mask, row["truncated"])
