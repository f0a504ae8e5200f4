"""The settings of the scoring engine."""

from dataclasses import dataclass
from typing import Literal, get_args

from selectmoe.config.checks import require

Formula = Literal[
    "original",
    "answer_probability",
    "answer_margin",
    "answer_margin_second_half",
    "answer_margin_last",
]
RowLayout = Literal["padded", "packed"]
Dtype = Literal["float32", "bfloat16"]
Length = Literal["adjusted", "raw"]
Turns = Literal["all", "last"]
Signal = Literal["nll", "pmi", "vector", "router_entropy"]
HEAD_SIGNALS = frozenset({"nll", "pmi"})
"""Signals that need the whole model with its language-model head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How samples are tokenized and batched, how the model runs and how its gates are averaged."""

    formula: Formula = "answer_margin"
    """Scoring formula: which tokens and layers a score averages, as probabilities or margins."""
    length: Length = "adjusted"
    """Comparison of answers of different length: adjusted reads a score against answers of similar
    length, as the selector's calibration has them; raw is the plain average of the formula. A
    selector without such a calibration always gives raw scores."""
    turns: Turns = "all"
    """Assistant turns that are scored: all of a conversation, or the last one with the others as
    its context."""
    max_sequence_length: int = 1_024
    """Maximum tokens per sample; longer samples are truncated."""
    max_tokens_per_batch: int | None = None
    """Maximum tokens per forward pass, padding included; null is 4,096 on a CPU, and on a GPU what
    its free memory allows, at most 65,536."""
    row_layout: RowLayout | None = None
    """Layout of a batch: padded to the longest row, or packed (variable length) without padding;
    null is packed on a GPU (Ampere or newer) and padded elsewhere."""
    dtype: Dtype | None = None
    """Dtype of weights and activations; null is bfloat16 on a GPU and float32 on a CPU."""
    attn_implementation: str = "sdpa"
    """Attention implementation of transformers: eager, sdpa or flash_attention_2. Any other than
    sdpa forces padded batches."""
    experts_implementation: str | None = None
    """Experts implementation of transformers: eager, grouped_mm or batched_mm; null is eager on a
    CPU and grouped_mm on a GPU. Setting it forces padded batches."""

    signals: tuple[str, ...] = ()
    """Signals beside the score: nll (mean negative log-likelihood of the answer), pmi (what the
    prompt contributes to it; a second forward pass), vector (embedding of the row) and
    router_entropy (bases with experts). They force padded batches; [] is the score alone."""

    def __post_init__(self) -> None:
        choices = {
            "formula": Formula,
            "length": Length,
            "turns": Turns,
            "row_layout": RowLayout,
            "dtype": Dtype,
        }
        for name, literal in choices.items():
            value, words = getattr(self, name), get_args(literal)
            known = value in words or (value is None and name in ("row_layout", "dtype"))
            require(known, name, f"one of {', '.join(words)}", value)
        length, tokens = self.max_sequence_length, self.max_tokens_per_batch
        require(length >= 1, "max_sequence_length", "at least 1", length)
        require(tokens is None or tokens >= 1, "max_tokens_per_batch", "at least 1", tokens)
        self._check_signals()
        if self.row_layout == "packed":
            rule = "[] with row_layout=packed: they are read from padded batches"
            require(not self.signals, "signals", rule, list(self.signals))
            for name, unset in (("attn_implementation", "sdpa"), ("experts_implementation", None)):
                rule = f"{unset or 'null'} with row_layout=packed, which has its own"
                require(getattr(self, name) == unset, name, rule, getattr(self, name))

    def _check_signals(self) -> None:
        known = get_args(Signal)
        for name in self.signals:
            require(name in known, "signals", f"some of {', '.join(known)}", name)
        unique = len(set(self.signals)) == len(self.signals)
        require(unique, "signals", "different names", list(self.signals))
