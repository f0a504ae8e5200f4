"""Conversations as HTML: tokens in their order, folded, and never markup."""

import re

from markupsafe import Markup

from selectmoe.records import Message, Sample
from selectmoe.report.examples import ScoredText, TextPiece, pieces_of
from selectmoe.report.page_text import level_edges, shortened, shown_text

SAMPLE = Sample("demo", "1", (Message("user", "Why?"), Message("assistant", "é<b>")))


def plain(markup: Markup) -> str:
    return re.sub("<[^>]*>", "", str(markup))


def test_tokens_give_the_text_once_though_they_share_a_character_or_leave_a_gap():
    text = "Why? é<b> end"
    tokens = [
        ("Why?", 0, 4, False, 0.1),
        ("é", 5, 6, True, 0.2),  # two tokens of one character, as in a byte-level vocabulary
        ("é", 5, 6, True, 0.3),
        ("<b>", 6, 9, True, 0.9),
    ]
    pieces = pieces_of(SAMPLE, ScoredText(text, tokens))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.score for piece in pieces] == [None, None, 0.2, 0.9, None]


def test_tokens_of_a_server_have_blanks_where_it_tells_no_text():
    pieces = pieces_of(SAMPLE, ScoredText("", [("a", 0, 1, True, 0.5), ("b", 2, 3, True, 0.5)]))
    assert "".join(piece.text for piece in pieces) == "a b"


def test_without_scores_messages_are_shown_with_their_roles():
    pieces = pieces_of(SAMPLE, None)
    assert [piece.text for piece in pieces] == ["user: Why?\n", "assistant: é<b>\n"]
    assert [piece.is_answer for piece in pieces] == [False, True]


def test_a_long_turn_is_folded_and_a_longer_one_cut_and_counted():
    pieces = [TextPiece("q" * 1_000, False, None), TextPiece("a" * 10_000, True, None)]
    shown = shown_text(pieces, level_edges([]))
    prompt, answer = shown.turns
    assert (len(prompt.shown), prompt.num_folded) == (400, 600)
    assert (len(answer.shown), answer.num_folded) == (900, 2_100)
    assert shown.num_left_out == 7_000


def test_the_color_of_a_token_is_its_ninth_among_all_scores():
    scores = [number / 900 for number in range(900)]
    pieces = [TextPiece(f"t{number} ", True, scores[100 * number + 50]) for number in range(9)]
    [turn] = shown_text(pieces, level_edges(scores)).turns
    assert re.findall(r"class=h(\d)", str(turn.shown)) == [*"012345678"]
    assert plain(turn.shown) == "t0 t1 t2 t3 t4 t5 t6 t7 t8 "


def test_a_name_is_shortened_to_one_line_without_control_characters():
    assert shortened("a\x00b\n c" + "d" * 50, 10) == "a\u2400b cddddd"[:9] + "…"
