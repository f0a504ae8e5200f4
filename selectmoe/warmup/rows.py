"""The rows that a gate warm-up learns from, and their tokenizer."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from selectmoe.config.columns import ColumnRules
from selectmoe.config.warmup import WarmupConfig
from selectmoe.corpus.shards import keep_subset, read_shard
from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.named_corpora import corpus_specs
from selectmoe.data.readers import read_corpora
from selectmoe.model.checkpoint import model_folder
from selectmoe.model.tokenizer_loading import load_tokenizer
from selectmoe.paths import DEMO_CORPUS, model_or_embedded
from selectmoe.records import RejectedRow, Sample
from selectmoe.training.tokenized_rows import (
    ChosenRows,
    Progress,
    RowsToTokenize,
    TokenizedRows,
    TokenizedSummary,
    chat_tokenizer,
    prepare_rows,
    rows_file,
)
from selectmoe.warmup.step_batches import TrainingRows

CLEAN_DEMO = "demo"  # the demo corpus also has rows that were corrupted on purpose


def prepare_warmup_rows(
    config: WarmupConfig, chat: ChatTokenizer, run: Path, *, on_progress: Progress | None = None
) -> TokenizedSummary:
    """Tokenizes the rows of `config.dataset` into the folder of a run, as `prepare_rows` does."""
    rows = RowsToTokenize(
        choose=lambda: choose_warmup_rows(config),
        settings=asdict(config.dataset),
        max_rejected=config.max_rejected,
        full_sequence=config.training.full_sequence_prediction,
    )
    return prepare_rows(rows, chat, run, on_progress=on_progress)


def choose_warmup_rows(config: WarmupConfig) -> ChosenRows:
    """The subset of the corpora that the settings name, else of the clean demo rows."""
    specs, ratio = corpus_specs(config.dataset), config.dataset.subset_ratio

    def read() -> Iterator[Sample | RejectedRow]:
        rules = ColumnRules(config.dataset.columns, keeps_extra=False)
        rows = read_corpora(specs or [str(DEMO_CORPUS)], rules=rules)
        if not specs:
            rows = (row for row in rows if row.dataset == CLEAN_DEMO)
        return keep_subset(rows, ratio=ratio) if ratio < 1 else rows

    rows_read = "all rows" if ratio == 1 else f"a subset ({ratio:g}) of the rows"
    return ChosenRows(read, None, f"{rows_read} of {', '.join(specs) or 'the demo corpus'}")


def warmup_tokenizer(config: WarmupConfig) -> ChatTokenizer:
    """The tokenizer of the model to warm up."""
    model = model_or_embedded(config.model, config.revision)
    length = config.dataset.max_sequence_length
    return chat_tokenizer(load_tokenizer(model_folder(model)), model, max_sequence_length=length)


def load_training_rows(run: Path) -> TrainingRows:
    """What `prepare_warmup_rows` wrote."""
    rows = TokenizedRows(run)
    samples = [sample for _, sample in read_shard(rows_file(run))]
    return TrainingRows(samples, [rows.row(number) for number in range(len(rows))])
