"""The language-model loss on the answers of held-out conversations.

Text, tokens and counted tokens are those of finetuning (`data/chat.py`): the whole conversation in
the chat template, of which the assistant's tokens and the end of each turn count. lm-eval would
prepend a token of its own and supports neither several turns nor a tokenizer without a template, so
this measure is computed here and reported beside lm-eval's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.packing import pad_samples
from selectmoe.data.rejected import NO_ANSWER_TOKEN, reject
from selectmoe.errors import ModelError
from selectmoe.records import PaddedBatch, RejectedRow, Sample, TokenizedSample, UnscoredSample

# Shape letters: B = rows of a batch, T = tokens of its longest row.

# The logits of a batch take 4 bytes per token and vocabulary entry: 1 GB at 128,000 entries.
MAX_TOKENS_PER_BATCH = 2_048


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """The loss on all answers of one conversation."""

    position: int  # of the conversation in the given list
    nll: float  # nats, summed over the tokens of the answers
    num_tokens: int
    num_bytes: int  # of the answers in UTF-8, without the end of each turn


def answer_losses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_sequence_length: int,
) -> tuple[list[AnswerLoss], list[RejectedRow]]:
    """The losses in the order of `samples`, and the samples that cannot be evaluated as a whole.

    Raises ModelError if a loss is not finite.
    """
    chat = ChatTokenizer(tokenizer, max_sequence_length=max_sequence_length)
    kept: dict[int, TokenizedSample] = {}
    rejected: list[RejectedRow] = []
    for position, tokenized in enumerate(chat.tokenize_each(samples)):
        outcome = _complete_or_refused(tokenized)
        if isinstance(outcome, UnscoredSample):
            sample = samples[position]
            rejected.append(reject(outcome, dataset=sample.dataset, source=sample.source))
        else:
            kept[position] = outcome
    positions = list(kept)
    losses: dict[int, AnswerLoss] = {}
    for batch in pad_samples(list(kept.values()), max_tokens_per_batch=MAX_TOKENS_PER_BATCH):
        nll_B, num_tokens_B = batch_losses(model, batch)
        for index, nll, num_tokens in zip(batch.positions, nll_B, num_tokens_B, strict=True):
            position = positions[index]
            if not np.isfinite(nll):
                sample_id = samples[position].sample_id
                raise ModelError(f"the model's loss on {sample_id} is not finite, got {nll}")
            num_bytes = _num_answer_bytes(chat, samples[position])
            losses[position] = AnswerLoss(position, float(nll), int(num_tokens), num_bytes)
    return [losses[position] for position in positions], rejected


def _complete_or_refused(
    outcome: TokenizedSample | UnscoredSample,
) -> TokenizedSample | UnscoredSample:
    if isinstance(outcome, UnscoredSample):
        return outcome
    if outcome.truncated:
        detail = f"longer than the model's maximum of {len(outcome.token_ids)} tokens"
        return UnscoredSample(outcome.sample_id, "too_long", detail)
    if not outcome.answer_mask[1:].any():
        return UnscoredSample(outcome.sample_id, "no_answer_token", NO_ANSWER_TOKEN)
    return outcome


def _num_answer_bytes(chat: ChatTokenizer, sample: Sample) -> int:
    text, spans = chat.render(sample.messages, sample.tools)
    return sum(len(text[start:end].encode()) for start, end in spans)


def batch_losses(model: torch.nn.Module, batch: PaddedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of answer tokens per row; a first token has no prediction."""
    device = next(model.parameters()).device
    ids_BT = torch.from_numpy(batch.token_ids).to(device)
    mask_BT = torch.from_numpy(batch.attention_mask).to(device)
    answer_BT = torch.from_numpy(batch.answer_mask).to(device)[:, 1:]
    with torch.inference_mode():
        logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        nll_BT = cross_entropy(
            logits[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none"
        )
        # where, not a product: padding may have an infinite loss, and 0 times infinity is NaN.
        nll_B = torch.where(answer_BT, nll_BT, 0.0).double().sum(dim=1)
    return nll_B.cpu().numpy(), answer_BT.sum(dim=1).cpu().numpy()
