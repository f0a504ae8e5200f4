"""The records of the pipeline: a sample changes its type when it changes its meaning.

Sample -> TokenizedSample -> PaddedBatch or PackedBatch -> ScoredSample
RejectedRow     instead of a Sample, when a row of the corpus breaks the input contract
UnscoredSample  instead of a ScoredSample, when the model has no number for it
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Shape letters: B = rows of a batch, T = tokens of a row, N = tokens of a batch, L = layers.


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str
    fields: str = ""  # its other keys as a JSON object, such as tool_calls; empty without any

    def __reduce__(self) -> tuple[type["Message"], tuple[str, str, str]]:
        # Half the time of what a dataclass with slots does, and a corpus is pickled once.
        return Message, (self.role, self.content, self.fields)


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation of a corpus, checked; it has at least one assistant turn that is trained on
    and has text, reasoning or a tool call."""

    dataset: str
    sample_id: str  # "id" in files; not necessarily unique
    messages: tuple[Message, ...]
    source: str = ""  # "<file>:<row>" where it was read; not a part of its content
    tools: str = ""  # functions that the assistant may call, as a JSON list; empty without any
    extra_columns: str = ""  # columns that are no part of it, as a JSON object; empty without any
    has_unusable_name: bool = False  # its row has a dataset or id that is none, and was ignored

    def texts(self) -> Iterator[str]:
        """All that a chat template may write: contents, reasoning, tool calls and tools."""
        for message in self.messages:
            yield from (message.content, message.fields)
        yield self.tools


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row of the corpus that is left out, where it is and why."""

    file: str
    row: int  # from 1, a line as an editor counts them, or a row of an array or table
    dataset: str
    sample_id: str  # empty where the row is too broken to have one
    reason: str  # a key for programs: "invalid_json", "unknown_role", ...
    detail: str  # a sentence for people: the rule and the value


@dataclass(frozen=True, slots=True, eq=False)  # == on arrays gives no single answer
class TokenizedSample:
    """One sample as the model reads it."""

    sample_id: str
    token_ids: np.ndarray  # int32 (T,)
    answer_mask: np.ndarray  # bool (T,), True where the assistant speaks
    truncated: bool  # True when token_ids is only the beginning of the sample
    # The answer without its prompt, for the signal pmi; None where nobody asks, or there is none.
    answer_alone: "TokenizedSample | None" = None


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Samples of similar length, padded on the right to the longest."""

    positions: np.ndarray  # int64 (B,), index of each row in the list that was batched
    token_ids: np.ndarray  # int64 (B, T)
    attention_mask: np.ndarray  # bool (B, T), False on padding
    answer_mask: np.ndarray  # bool (B, T), False on padding


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Samples packed (variable length) into one sequence, in their order, without padding."""

    samples: tuple[TokenizedSample, ...]
    positions: np.ndarray  # int64 (B,), index of each sample in the list that was batched
    token_ids: np.ndarray  # int64 (N,)
    position_ids: np.ndarray  # int64 (N,), 0, 1, … within each sample
    cu_seqlens: np.ndarray  # int32 (B + 1,), cumulative lengths: 0, …, N


@dataclass(frozen=True, slots=True, eq=False)
class SampleSignals:
    """What a forward pass says of one sample beside its score (`scoring/signals.py`).

    None where it was not asked for, or has no finite value.
    """

    nll: float | None = None  # nats per answer token
    pmi: float | None = None  # nats per answer token
    router_entropy: float | None = None  # nats
    vector: np.ndarray | None = None  # float16 (D,), of length 1


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSample:
    """What the gates say of one sample."""

    sample_id: str
    score: float  # in (0, 1), higher is better; always finite
    num_tokens: int  # tokens that the model read
    num_answer_tokens: int  # of these, the assistant's
    truncated: bool
    layer_scores: np.ndarray  # float32 (L,), the same average for every layer by itself
    signals: SampleSignals | None = None  # None where none was asked for


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """A scored sample, and what the formula gives for each of its tokens by itself."""

    sample: ScoredSample
    token_scores: np.ndarray  # float32 (T,), in (0, 1)


@dataclass(frozen=True, slots=True)
class UnscoredSample:
    """A sample that the model could not score, and why."""

    sample_id: str
    reason: str  # a key for programs: "chat_template", "score_not_finite"
    detail: str  # a sentence for people
