"""A conversation as token ids and the mask of what the assistant says: the only place that knows
chat templates.

A template is rendered once for each sequence of roles, with a placeholder for every content. The
pieces between the placeholders are what the template adds; with the contents in their places they
give the text of a sample and, exactly, where each assistant turn begins and ends in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selectmoe.errors import DataError
from selectmoe.records import Message, Sample, TokenizedSample

# For tokenizers without a template: the plain-text layout of open-instruct.
DEFAULT_CHAT_TEMPLATE = (
    # '\n' as an expression: transformers drops a line break right after a block.
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Private-use letters, and tabs to see whether a template trims; no template writes tabs itself.
_PLACEHOLDER = "\t\ue000{}\ue001\t"


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What a template adds around the contents of one sequence of roles."""

    pieces: tuple[str, ...]  # one before each content in `order`, and one after the last
    order: tuple[int, ...]  # which message stands there; some templates move or repeat one
    trims: tuple[bool, ...]  # True where the template strips white space around the content


class ChatTokenizer:
    """Turns samples into token ids and answer masks; keeps one skeleton for each roles' order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_sequence_length: int) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} must be a fast one (tokenizer.json): "
                "the answer mask needs to know which characters a token covers"
            )
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The sample as text, and the (start, end) characters of every assistant turn in it.

        Raises DataError where the template refuses this sequence of roles.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        parts = [skeleton.pieces[0]]
        spans = []
        length = len(parts[0])
        for index, trims, piece in zip(
            skeleton.order, skeleton.trims, skeleton.pieces[1:], strict=True
        ):
            content = messages[index].content.strip() if trims else messages[index].content
            if roles[index] == "assistant":
                spans.append((length, length + len(content)))
            parts += (content, piece)
            length += len(content) + len(piece)
        return "".join(parts), spans

    def tokenize(self, samples: Sequence[Sample]) -> list[TokenizedSample]:
        """Token ids and answer masks; a sample longer than `max_sequence_length` is cut there.

        The token after an assistant turn (its end-of-turn mark) belongs to the answer: it is where
        a model can see that an answer stopped too early.
        """
        rendered = [self.render(sample.messages) for sample in samples]
        encodings = self.tokenizer._tokenizer.encode_batch(
            [text for text, _ in rendered], add_special_tokens=False
        )
        tokenized = []
        for sample, (_, spans), encoding in zip(samples, rendered, encodings, strict=True):
            kept = slice(self.max_sequence_length)
            offsets = np.array(encoding.offsets[kept], dtype=np.int64).reshape(-1, 2)
            tokenized.append(
                TokenizedSample(
                    sample_id=sample.sample_id,
                    token_ids=np.array(encoding.ids[kept], dtype=np.int32),
                    answer_mask=_inside(offsets, spans),
                    truncated=len(encoding.ids) > self.max_sequence_length,
                )
            )
        return tokenized

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        stand_ins = [_PLACEHOLDER.format(index) for index in range(len(roles))]
        conversation = [
            {"role": role, "content": stand_in}
            for role, stand_in in zip(roles, stand_ins, strict=True)
        ]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    conversation, chat_template=self.template, tokenize=False
                )
            )
        except TemplateError as error:
            raise DataError(
                f"the tokenizer's chat template refuses the roles {', '.join(roles)}: {error}"
            ) from error
        return _split(text, roles)


def _split(text: str, roles: tuple[str, ...]) -> _Skeleton:
    pieces, order, trims = [], [], []
    rest = text
    while "\ue000" in rest:
        before, rest = rest.split("\ue000", 1)
        index, rest = rest.split("\ue001", 1)
        kept_tabs = before.endswith("\t") and rest.startswith("\t")
        pieces.append(before[:-1] if kept_tabs else before)
        rest = rest[1:] if kept_tabs else rest
        order.append(int(index))
        trims.append(not kept_tabs)
    missing = [
        index for index, role in enumerate(roles) if role == "assistant" and index not in order
    ]
    if missing:
        raise DataError(
            "the tokenizer's chat template leaves out the assistant turn at "
            f"messages[{missing[0]}] of the roles {', '.join(roles)}"
        )
    return _Skeleton((*pieces, rest), tuple(order), tuple(trims))


def _inside(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """True for tokens that cover a character of a span, and for the one right after it."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        mask[first : last + 1] = True
    return mask
