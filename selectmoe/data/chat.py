"""Chat templates: a conversation as token ids and the mask of its assistant turns.

A template is rendered once for each sequence of roles, with a placeholder for every content. The
pieces between the placeholders are what the template adds; joined with the contents they give the
text of a sample and, exactly, the characters where each assistant turn begins and ends.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selectmoe.config.engine import Turns
from selectmoe.data.first_tokens import FirstTokens
from selectmoe.data.message_fields import is_answer, tool_calls_of, tools_of
from selectmoe.data.rejected import refuse_cut_answer
from selectmoe.data.skeleton import (
    PLACEHOLDER,
    PROBE,
    Skeleton,
    left_out,
    parse_skeleton,
    require_unchanged,
)
from selectmoe.data.turn_plan import TurnPlan, make_plan, needs_plan, plan_shape, require_tool_calls
from selectmoe.errors import ChatTemplateError, DataError
from selectmoe.records import Message, Sample, TokenizedSample, UnscoredSample

# For tokenizers without a template: the plain-text layout of open-instruct.
DEFAULT_CHAT_TEMPLATE = (
    # '\n' as an expression: transformers drops a line break right after a block.
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# A template is a program: besides its own complaints it may divide by zero.
TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
    RecursionError,
)  # fmt: skip


def package_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The package's template, for tokenizers that have none.

    A tokenizer that begins every text with a BOS token (Llama's) does so here too: its model was
    trained on no text without one.
    """
    first = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + DEFAULT_CHAT_TEMPLATE


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
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._plans: dict[tuple[str, ...], TurnPlan] = {}
        self._takes_tools: bool | None = None  # None: not tried yet
        self._first_tokens = FirstTokens(tokenizer.backend_tokenizer)

    def render(
        self, messages: Sequence[Message], tools: str = ""
    ) -> tuple[str, list[tuple[int, int]]]:
        """The sample as text, and the (start, end) characters of every assistant turn in it that
        is trained on.

        tools: as in `Sample`; where the template takes none, they follow the system turn's text.
        Raises ChatTemplateError where the template refuses this conversation, or leaves out a part
        of it.
        """
        if tools or needs_plan(messages):
            return self._render_plan(messages, tools)
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        for index in skeleton.missing(len(roles)):
            if messages[index].content.strip():
                raise left_out(roles[index], index, ", ".join(roles))
        text, spans = skeleton.render([message.content for message in messages])
        return text, [(start, end) for index, start, end in spans if is_answer(messages[index])]

    def _render_plan(
        self, messages: Sequence[Message], tools: str
    ) -> tuple[str, list[tuple[int, int]]]:
        if tools and not self.takes_tools():
            messages, tools = _with_tools(messages, tools), ""
            if not needs_plan(messages):
                return self.render(messages)
        shape = None if tools else plan_shape(messages)
        if shape is not None and shape in self._plans:
            return self._plans[shape].render(messages)
        template = functools.partial(self._apply_template, tools=tools_of(tools))
        if any(map(tool_calls_of, messages)):
            require_tool_calls(template)
        plan = make_plan(template, messages)
        if shape is not None:
            self._plans[shape] = plan
        return plan.render(messages)

    def takes_tools(self) -> bool:
        """Whether the template writes the functions that the assistant may call."""
        if self._takes_tools is None:
            name = "\ue000tool\ue001"
            tools = tools_of(json.dumps([{"name": name, "description": "", "parameters": {}}]))
            try:
                text = self._apply_template([{"role": "user", "content": "?"}], tools=tools)
            except ChatTemplateError:
                text = ""
            self._takes_tools = name in text
        return self._takes_tools

    def tokenize(self, samples: Sequence[Sample]) -> list[TokenizedSample]:
        """Token ids and answer masks, truncated to `max_sequence_length`.

        The token after an assistant turn (its end-of-turn mark) belongs to the answer: it is where
        a model can see that an answer stopped too early. Raises DataError as `render` does.
        """
        rendered = [self.render(sample.messages, sample.tools) for sample in samples]
        return list(self._encode(samples, rendered))

    def tokenize_each(self, samples: Sequence[Sample]) -> list[TokenizedSample | UnscoredSample]:
        """As `tokenize`, but a sample that the template refuses leaves the others alone."""
        accepted: list[Sample] = []
        rendered = []
        refused: dict[int, UnscoredSample] = {}
        for position, sample in enumerate(samples):
            try:
                rendered.append(self.render(sample.messages, sample.tools))
                accepted.append(sample)
            except ChatTemplateError as error:
                refused[position] = UnscoredSample(sample.sample_id, error.reason, str(error))
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
        encodings = self._first_tokens.encode_each(
            [text for text, _ in rendered], self.max_sequence_length
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
        text, spans = self.render(sample.messages, sample.tools)
        [encoding] = self._first_tokens.encode_each([text], self.max_sequence_length)
        offsets = encoding.offsets[: self.max_sequence_length]
        mask = self._answer_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), spans)
        return [
            TokenText(text[start:end], start, end, bool(is_answer))
            for (start, end), is_answer in zip(offsets, mask, strict=True)
        ]

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton:
        def text_of(contents: Sequence[str]) -> str:
            pairs = zip(roles, contents, strict=True)
            return self._apply_template([{"role": r, "content": content} for r, content in pairs])

        skeleton = parse_skeleton(text_of([PLACEHOLDER.format(slot) for slot in range(len(roles))]))
        probes = [PROBE.format(slot) for slot in range(len(roles))]
        require_unchanged(skeleton, probes, text_of(probes), ", ".join(roles))
        return skeleton

    def _apply_template(
        self,
        conversation: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(conversation),
                    tools=list(tools) or None,
                    chat_template=self.template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
        except TEMPLATE_FAILURES as error:
            roles = ", ".join(entry["role"] for entry in conversation)
            raise ChatTemplateError(
                f"the tokenizer's chat template refuses the roles {roles}: {error}"
            ) from error


def _with_tools(messages: Sequence[Message], tools: str) -> tuple[Message, ...]:
    """The messages with the tools in their system turn, which is added where there is none."""
    if messages[0].role != "system":
        return (Message("system", tools), *messages)
    first = messages[0]
    return (replace(first, content=f"{first.content}\n\n{tools}"), *messages[1:])


def _mask_spans(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """True for tokens that cover a character of a span, and for the one right after it."""
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        mask[first : last + 1] = True
    return mask
