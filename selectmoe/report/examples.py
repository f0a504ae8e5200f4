"""The example rows of a report: where they lie, their texts, and the score of each token."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selectmoe.corpus.shards import read_rows
from selectmoe.data.message_fields import is_answer
from selectmoe.records import Sample
from selectmoe.report.score_survey import FoundRow
from selectmoe.selection.run_folder import RunFolder

GROUPS = {
    "best": "Highest scores",
    "last_kept": "At the threshold: last rows kept",
    "first_dropped": "At the threshold: first rows dropped",
    "worst": "Lowest scores",
    "random_kept": "Random choice of the kept rows",
    "disagreements": "Score and another signal disagree most, of a random sample",
}


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A part of a conversation as it is shown: a token, or a text without a score."""

    text: str
    is_answer: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The tokens of one conversation, each with its characters and score."""

    text: str  # rendered by the chat template; empty where only the tokens are known
    tokens: Sequence[tuple[str, int, int, bool, float]]
    """Text, first character, end, whether it is the assistant's, score."""


ScoreTexts = Callable[[Sequence[Sample]], Sequence[ScoredText | None]]
"""Gives the tokens of each sample; None where the model has no score for it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the report shows it."""

    sample: Sample
    found: FoundRow
    pieces: list[TextPiece]


def read_examples(
    folder: RunFolder, found: Mapping[str, Sequence[FoundRow]], score_texts: ScoreTexts | None
) -> dict[str, list[Example]]:
    """The rows of each group in GROUPS; a row that an earlier group has is not repeated.

    folder: of the run that has scored. score_texts: None where no model scores tokens.
    """
    wanted: dict[str, list[FoundRow]] = {}
    seen: set[tuple[str, int]] = set()
    for name in GROUPS:
        rows = [row for row in found.get(name, ()) if (row.shard, row.row) not in seen]
        seen.update((row.shard, row.row) for row in rows)
        wanted[name] = rows
    samples = _read_samples(folder, seen)
    texts: dict[tuple[str, int], ScoredText | None] = dict.fromkeys(samples)
    if score_texts is not None:
        texts = dict(zip(samples, score_texts(list(samples.values())), strict=True))
    return {
        name: [
            Example(samples[key], row, pieces_of(samples[key], texts[key]))
            for row in rows
            if (key := (row.shard, row.row)) in samples
        ]
        for name, rows in wanted.items()
    }


def pieces_of(sample: Sample, scored: ScoredText | None) -> list[TextPiece]:
    """The whole conversation in its order, by token where they are known, else by message."""
    if scored is None:
        return [
            TextPiece(f"{message.role}: {message.content}\n", is_answer(message), None)
            for message in sample.messages
        ]
    pieces: list[TextPiece] = []
    position = 0
    for text, start, end, token_is_answer, score in scored.tokens:
        if start > position:  # as blanks that the tokenizer leaves out
            pieces.append(TextPiece(scored.text[position:start] or " ", token_is_answer, None))
        # Tokens that are parts of one character all cover it: it is shown once.
        if end > position:
            shown = text[max(position - start, 0) :]
            pieces.append(TextPiece(shown, token_is_answer, score if token_is_answer else None))
            position = end
    if rest := scored.text[position:]:
        pieces.append(TextPiece(rest, False, None))
    return pieces


def _read_samples(folder: RunFolder, keys: set[tuple[str, int]]) -> dict[tuple[str, int], Sample]:
    """The samples at these shards and rows."""
    samples: dict[tuple[str, int], Sample] = {}
    for shard, of_shard in itertools.groupby(sorted(keys), key=lambda key: key[0]):
        rows = [row for _, row in of_shard]
        read = read_rows(folder.corpus / shard, np.array(rows, dtype=np.int64))
        samples |= {(shard, row): sample for row, sample in zip(rows, read, strict=True)}
    return samples
