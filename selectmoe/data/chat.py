"""Chat templates: a conversation as token ids and the mask of its assistant turns.

A template is rendered once for each sequence of roles, with a placeholder for every content. The
pieces between the placeholders are what the template adds; joined with the contents they give the
text of a sample and, exactly, the characters where each assistant turn begins and ends.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selectmoe.config.engine import Turns
from selectmoe.data.rejected import refuse_cut_answer
from selectmoe.errors import DataError
from selectmoe.records import Message, Sample, TokenizedSample, UnscoredSample

# For tokenizers without a template: the plain-text layout of open-instruct.
DEFAULT_CHAT_TEMPLATE = (
    # '\n' as an expression: transformers drops a line break right after a block.
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Private-use letters, and tabs to see whether a template trims; no template writes tabs itself.
_PLACEHOLDER = "\t\ue000{}\ue001\t"
_STRIPS: dict[tuple[bool, bool], Callable[[str], str]] = {  # by (keeps left, keeps right)
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
# Ordinary text that reveals a template which does more to contents than strip them.
_PROBE = ' Probe {}: "two" & <b>words</b>,\n\nsecond line.\n'


def package_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The package's template, for tokenizers that have none.

    A tokenizer that begins every text with a BOS token (Llama's) does so here too: its model was
    trained on no text without one.
    """
    first = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + DEFAULT_CHAT_TEMPLATE


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What a template adds around the contents of one sequence of roles."""

    pieces: tuple[str, ...]  # one before each content in `order`, and one after the last
    order: tuple[int, ...]  # index of the message; some templates move or repeat one
    strips: tuple[Callable[[str], str], ...]  # what the template does to white space around it

    def render(self, contents: Sequence[str]) -> tuple[str, list[tuple[int, int, int]]]:
        """The text, and the characters of each content in it: (message, start, end)."""
        parts, spans = [self.pieces[0]], []
        length = len(parts[0])
        for index, strip, piece in zip(self.order, self.strips, self.pieces[1:], strict=True):
            content = strip(contents[index])
            spans.append((index, length, length + len(content)))
            parts += (content, piece)
            length += len(content) + len(piece)
        return "".join(parts), spans


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a rendered conversation; tokens that share a character both include it."""

    text: str
    start: int  # characters of the rendered conversation: [start, end)
    end: int
    is_answer: bool


class ChatTokenizer:
    """Turns samples into token ids and answer masks; caches a skeleton per sequence of roles."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_sequence_length: int,
        turns: Turns = "all",
    ) -> None:
        """turns: assistant turns that count as the answer; "last" leaves the others to the prompt.
        Of a sample whose last answer is truncated away, the last one that is left counts."""
        if not tokenizer.is_fast:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path!r} must be a fast one (tokenizer.json): "
                "the answer mask needs to know which characters a token covers"
            )
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.turns = turns
        self.template = tokenizer.chat_template or package_template(tokenizer)
        self._skeletons: dict[tuple[str, ...], _Skeleton] = {}

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The sample as text, and the (start, end) characters of every assistant turn in it.

        Raises DataError where the template refuses this sequence of roles.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        text, spans = self._skeletons[roles].render([message.content for message in messages])
        return text, [(start, end) for index, start, end in spans if roles[index] == "assistant"]

    def tokenize(self, samples: Sequence[Sample]) -> list[TokenizedSample]:
        """Token ids and answer masks, truncated to `max_sequence_length`.

        The token after an assistant turn (its end-of-turn mark) belongs to the answer: it is where
        a model can see that an answer stopped too early. Raises DataError as `render` does.
        """
        rendered = [self.render(sample.messages) for sample in samples]
        return list(self._encode(samples, rendered))

    def tokenize_each(self, samples: Sequence[Sample]) -> list[TokenizedSample | UnscoredSample]:
        """As `tokenize`, but a sample that the template refuses leaves the others alone."""
        accepted: list[Sample] = []
        rendered = []
        refused: dict[int, UnscoredSample] = {}
        for position, sample in enumerate(samples):
            try:
                rendered.append(self.render(sample.messages))
                accepted.append(sample)
            except DataError as error:
                refused[position] = UnscoredSample(sample.sample_id, "chat_template", str(error))
        tokenized = self._encode(accepted, rendered)
        return [refused.get(position) or next(tokenized) for position in range(len(samples))]

    def tokenize_to_score(
        self, samples: Sequence[Sample]
    ) -> list[TokenizedSample | UnscoredSample]:
        """As `tokenize_each`; refuses also what truncation leaves no token of an answer of."""
        return [
            outcome if isinstance(outcome, UnscoredSample) else refuse_cut_answer(outcome)
            for outcome in self.tokenize_each(samples)
        ]

    def _encode(
        self, samples: Sequence[Sample], rendered: Sequence[tuple[str, list[tuple[int, int]]]]
    ) -> Iterator[TokenizedSample]:
        """Encodes the texts in one batch, on all the threads that the tokenizer has."""
        encodings = self.tokenizer.backend_tokenizer.encode_batch(
            [text for text, _ in rendered], add_special_tokens=False
        )
        kept = slice(self.max_sequence_length)
        for sample, (_, spans), encoding in zip(samples, rendered, encodings, strict=True):
            offsets = np.array(encoding.offsets[kept], dtype=np.int64).reshape(-1, 2)
            yield TokenizedSample(
                sample_id=sample.sample_id,
                token_ids=np.array(encoding.ids[kept], dtype=np.int32),
                answer_mask=self._answer_mask(offsets, spans),
                truncated=len(encoding.ids) > self.max_sequence_length,
            )

    def _answer_mask(self, offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        if self.turns == "last":
            end = offsets[-1, 1] if len(offsets) else 0
            spans = [span for span in spans if span[0] < end][-1:]
        return _mask_spans(offsets, spans)

    def token_texts(self, sample: Sample) -> list[TokenText]:
        """The tokens of a sample, truncated as by `tokenize`, as pieces of its rendered text."""
        text, spans = self.render(sample.messages)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        offsets = encoding.offsets[: self.max_sequence_length]
        mask = self._answer_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), spans)
        return [
            TokenText(text[start:end], start, end, bool(is_answer))
            for (start, end), is_answer in zip(offsets, mask, strict=True)
        ]

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton:
        placeholders = [_PLACEHOLDER.format(index) for index in range(len(roles))]
        skeleton = _parse_skeleton(self._apply_template(roles, placeholders), roles)
        probes = [_PROBE.format(index) for index in range(len(roles))]
        if skeleton.render(probes)[0] != self._apply_template(roles, probes):
            raise DataError(
                "the tokenizer's chat template changes the contents of messages, so that answers "
                f"cannot be found in its text, for the roles {', '.join(roles)}; give the model "
                "folder a template that inserts contents as they are"
            )
        return skeleton

    def _apply_template(self, roles: tuple[str, ...], contents: Sequence[str]) -> str:
        conversation = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation, chat_template=self.template, tokenize=False
                )
            )
        # A template is a program: besides its own complaints it may divide by zero.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise DataError(
                f"the tokenizer's chat template refuses the roles {', '.join(roles)}: {error}"
            ) from error


def _parse_skeleton(text: str, roles: tuple[str, ...]) -> _Skeleton:
    pieces, order, strips = [], [], []
    rest = text
    while "\ue000" in rest:
        before, rest = rest.split("\ue000", 1)
        index, rest = rest.split("\ue001", 1)
        keeps_left, keeps_right = before.endswith("\t"), rest.startswith("\t")
        pieces.append(before.removesuffix("\t"))
        rest = rest.removeprefix("\t")
        order.append(int(index))
        strips.append(_STRIPS[keeps_left, keeps_right])
    missing = [
        index for index, role in enumerate(roles) if role == "assistant" and index not in order
    ]
    if missing:
        raise DataError(
            "the tokenizer's chat template leaves out the assistant turn at "
            f"messages[{missing[0]}] of the roles {', '.join(roles)}"
        )
    return _Skeleton((*pieces, rest), tuple(order), tuple(strips))


def _mask_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """True for tokens that cover a character of a span, and for the one right after it."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        mask[first : last + 1] = True
    return mask
