"""Texts of a corpus as HTML: escaped, printable, folded, and colored by token score."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from selectmoe.report.examples import TextPiece

NUM_LEVELS = 9
VISIBLE_PROMPT = 400  # characters of a turn that are not folded
VISIBLE_ANSWER = 900
VISIBLE_TURNS = 6
# Of one row, so that 50 rows of any corpus stay below two megabytes.
MOST_CHARACTERS = 4_000
MOST_TOKENS = 600  # with a score each; later ones are shown without

# Control characters as their pictures, U+2400 and the following; line feeds and tabs stay.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


@dataclass(frozen=True, slots=True)
class Turns:
    """Consecutive text of one side, or all that follows VISIBLE_TURNS of them."""

    is_answer: bool
    shown: Markup
    folded: Markup
    num_folded: int  # characters


@dataclass(frozen=True, slots=True)
class ShownText:
    """A conversation as the page shows it."""

    turns: list[Turns]
    num_left_out: int  # characters at its end


def printable(text: str) -> str:
    """Without control characters and lone surrogates, which no HTML file may hold."""
    return text.translate(_PICTURES).encode("utf-8", "replace").decode()


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text, on one line."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def level_edges(scores: Iterable[float]) -> np.ndarray:
    """The scores between the levels: ninths of all tokens that are shown; float64 (8,)."""
    values = np.array(list(scores))
    if not len(values):
        return np.linspace(0, 1, NUM_LEVELS + 1)[1:-1]
    edges: np.ndarray = np.quantile(values, np.linspace(0, 1, NUM_LEVELS + 1)[1:-1])
    return edges


def shown_text(pieces: Sequence[TextPiece], edges: np.ndarray) -> ShownText:
    """The conversation, folded, with a background for each token that has a score."""
    pieces, num_left_out = _beginning(pieces)
    runs = [list(run) for _, run in itertools.groupby(pieces, key=lambda piece: piece.is_answer)]
    turns = []
    for run in runs[:VISIBLE_TURNS]:
        limit = VISIBLE_ANSWER if run[0].is_answer else VISIBLE_PROMPT
        if sum(len(piece.text) for piece in run) <= 1.3 * limit:
            limit = MOST_CHARACTERS
        head, tail = _split(run, limit)
        turns.append(_turns(head, tail, edges))
    if rest := list(itertools.chain(*runs[VISIBLE_TURNS:])):
        turns.append(_turns([], rest, edges))
    return ShownText(turns, num_left_out)


def _turns(head: Sequence[TextPiece], tail: Sequence[TextPiece], edges: np.ndarray) -> Turns:
    num_folded = sum(len(piece.text) for piece in tail)
    is_answer = (*head, *tail)[0].is_answer
    return Turns(is_answer, _colored(head, edges), _colored(tail, edges), num_folded)


def _beginning(pieces: Sequence[TextPiece]) -> tuple[list[TextPiece], int]:
    head, tail = _split(pieces, MOST_CHARACTERS)
    num_tokens = 0
    limited = []
    for piece in head:
        num_tokens += piece.score is not None
        too_many = num_tokens > MOST_TOKENS
        limited.append(TextPiece(piece.text, piece.is_answer, None) if too_many else piece)
    return limited, sum(len(piece.text) for piece in tail)


def _split(pieces: Sequence[TextPiece], limit: int) -> tuple[list[TextPiece], list[TextPiece]]:
    """The first `limit` characters, and the rest."""
    head: list[TextPiece] = []
    tail: list[TextPiece] = []
    left = limit
    for piece in pieces:
        if len(piece.text) <= left:
            head.append(piece)
        elif left:
            head.append(TextPiece(piece.text[:left], piece.is_answer, piece.score))
            tail.append(TextPiece(piece.text[left:], piece.is_answer, piece.score))
        else:
            tail.append(piece)
        left = max(left - len(piece.text), 0)
    return head, tail


def _colored(pieces: Sequence[TextPiece], edges: np.ndarray) -> Markup:
    return Markup("").join(
        _span(score, "".join(piece.text for piece in run), edges)
        for (score, _), run in itertools.groupby(
            pieces, key=lambda piece: (piece.score, None if piece.score is None else id(piece))
        )
    )


def _span(score: float | None, text: str, edges: np.ndarray) -> Markup:
    content = escape(printable(text))
    if score is None:
        return content
    level = int(np.searchsorted(edges, score, side="right"))
    return Markup("<i class=h{} title={:.3f}>{}</i>").format(level, score, content)
