"""The training data of finetuning: tokenized rows, padded batches and the order of the rows."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from selectmoe.config.finetune import FinetuneConfig
from selectmoe.data.chat import package_template
from selectmoe.data.packing import IGNORED_LABEL, collate_padded
from selectmoe.errors import ModelError
from selectmoe.finetune.sources import DRAWN_MODES, choose_rows
from selectmoe.model.tokenizer_loading import load_tokenizer
from selectmoe.paths import model_or_embedded
from selectmoe.training.tokenized_rows import (
    Progress,
    RowsToTokenize,
    TokenizedRows,
    TokenizedSummary,
    chat_tokenizer,
    prepare_rows,
)

# Shape letters: B = rows of a batch, T = tokens of its longest row.


class SupervisedRows(TokenizedRows, Dataset[int]):
    """The rows of a run in memory. As a dataset it yields row numbers, and `batch` the rows."""

    def __getitem__(self, number: int) -> int:
        return number

    def ids_of(self, numbers: Iterable[int]) -> list[str]:
        """The ids of rows, as the data has them."""
        return [self.sample_ids[number].as_py() for number in numbers]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The rows padded on the right, with labels on the assistant's tokens alone.

        There is no attention mask: causal attention never looks to the right, where the padding
        is, and without a mask it may use its fastest kernel.
        """
        rows = [self.row(number) for number in numbers]
        batch = collate_padded(rows, np.arange(len(rows)))
        labels_BT = np.where(batch.answer_mask, batch.token_ids, IGNORED_LABEL)
        labels_BT[:, 0] = IGNORED_LABEL  # no token precedes it that could predict it
        return {
            "input_ids": torch.from_numpy(batch.token_ids),
            "labels": torch.from_numpy(labels_BT),
            "row_numbers": torch.tensor(list(numbers)),
        }


class StepOrder(Sampler[int]):
    """A random order of the rows in each epoch; within one optimizer step, longest first.

    Which rows make a step, and so its gradient, is random. Sorting them within the step puts rows
    of similar length into one batch, which needs less padding.
    """

    def __init__(self, lengths: np.ndarray, *, rows_per_step: int, seed: int) -> None:
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader, with the current epoch of a resumed run too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        for start in range(0, len(order), self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            yield from step[np.argsort(-self.lengths[step], kind="stable")].tolist()


def load_target_tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the target, with a chat template.

    Raises ModelError for a tokenizer that is missing, unreadable or without a template.
    """
    return with_chat_template(
        load_tokenizer(model_or_embedded(config.model, config.revision)), config
    )


def with_chat_template(
    tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template that `dataset.chat_template` names.

    Raises ModelError where it has none.
    """
    if config.dataset.chat_template == "selectmoe":
        tokenizer.chat_template = package_template(tokenizer)
    elif not tokenizer.chat_template:
        raise ModelError(
            f"{config.model}: its tokenizer must have a chat template, and base models often have "
            "none; dataset.chat_template=selectmoe uses the package's, <|user|> … <|assistant|> …, "
            "and saves it with the adapter"
        )
    return tokenizer


def prepare_supervised_rows(
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    run: Path,
    *,
    on_progress: Progress | None = None,
) -> TokenizedSummary:
    """Tokenizes the rows of `config.dataset` into the folder of a run, as `prepare_rows` does.

    tokenizer: as `load_target_tokenizer` gives it.
    """
    assert tokenizer.chat_template
    model = model_or_embedded(config.model, config.revision)
    length = config.dataset.max_sequence_length
    chat = chat_tokenizer(tokenizer, model, max_sequence_length=length)
    rows = RowsToTokenize(
        choose=lambda: choose_rows(config.dataset, seed=config.seed),
        settings={
            **dataclasses.asdict(config.dataset),
            "seed": config.seed if config.dataset.mode in DRAWN_MODES else None,
        },
        max_rejected=config.max_rejected,
    )
    return prepare_rows(rows, chat, run, on_progress=on_progress)
