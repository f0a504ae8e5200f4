"""How surprising a model finds the answers of conversations that it has not seen.

The text, its tokens and the tokens that count are those of finetuning (`data/chat.py`): the whole
conversation in the chat template, the assistant's tokens and the mark that ends each turn. lm-eval
would add its own beginning to the text and can render neither several turns nor a tokenizer without
a template, so this one measure is computed here and only reported beside lm-eval's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.errors import ModelError
from selectmoe.records import PaddedBatch, Sample, TokenizedSample, UnscoredSample

# Shape letters: B = rows of a batch, T = tokens of its longest row.

# The logits of one batch take 4 bytes a token and entry of the vocabulary: 1 GB at 128,000 entries.
MAX_TOKENS_PER_BATCH = 2_048


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """The loss on all answers of one conversation."""

    position: int  # of the conversation in the list that was given
    nll: float  # nats, summed over the answers' tokens
    num_tokens: int
    num_bytes: int  # of the answers in UTF-8, without the marks that end them


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A conversation that the model cannot be asked about as a whole."""

    position: int
    reason: str  # a key for programs: "chat_template", "too_long", "no_answer_token"


def answer_losses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_sequence_length: int,
) -> tuple[list[AnswerLoss], list[LeftOut]]:
    """The losses in the order of `samples`, and what was left out of them.

    Raises ModelError where a loss is not finite.
    """
    chat = ChatTokenizer(tokenizer, max_sequence_length=max_sequence_length)
    kept: dict[int, TokenizedSample] = {}
    num_bytes: dict[int, int] = {}
    left_out: list[LeftOut] = []
    for position, sample in enumerate(samples):
        outcome = _tokenized(chat, sample)
        if isinstance(outcome, str):
            left_out.append(LeftOut(position, outcome))
        else:
            kept[position], num_bytes[position] = outcome
    positions = list(kept)
    losses: dict[int, AnswerLoss] = {}
    for batch in pad_samples(list(kept.values()), max_tokens_per_batch=MAX_TOKENS_PER_BATCH):
        nll_B, num_tokens_B = batch_losses(model, batch)
        for index, nll, num_tokens in zip(batch.positions, nll_B, num_tokens_B, strict=True):
            position = positions[index]
            if not np.isfinite(nll):
                sample_id = samples[position].sample_id
                raise ModelError(f"the model's loss on {sample_id} is not finite, got {nll}")
            losses[position] = AnswerLoss(
                position, float(nll), int(num_tokens), num_bytes[position]
            )
    return [losses[position] for position in positions], left_out


def _tokenized(chat: ChatTokenizer, sample: Sample) -> tuple[TokenizedSample, int] | str:
    """The tokens and the bytes of the answers, or why the sample is left out."""
    [tokenized] = chat.tokenize_each([sample])
    if isinstance(tokenized, UnscoredSample):
        return tokenized.reason
    if tokenized.truncated:
        return "too_long"
    if not tokenized.answer_mask[1:].any():
        return "no_answer_token"
    text, spans = chat.render(sample.messages)
    return tokenized, sum(len(text[start:end].encode()) for start, end in spans)


def batch_losses(model: torch.nn.Module, batch: PaddedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of the answer's tokens by row; a first token has no prediction."""
    device = next(model.parameters()).device
    ids_BT = torch.from_numpy(batch.token_ids).to(device)
    mask_BT = torch.from_numpy(batch.attention_mask).to(device)
    answer_BT = torch.from_numpy(batch.answer_mask).to(device)[:, 1:]
    with torch.inference_mode():
        logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        nll_BT = cross_entropy(
            logits[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none"
        )
        # where, not times: padding may have an infinite loss, and 0 times that is not 0.
        nll_B = torch.where(answer_BT, nll_BT, 0.0).double().sum(dim=1)
    return nll_B.cpu().numpy(), answer_BT.sum(dim=1).cpu().numpy()
