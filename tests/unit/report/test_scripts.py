"""The script of a text is that of most of its letters."""

import pytest

from selectmoe.report.scripts import script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Plain words, 12 %.", "Latin"),
        ("Ça coûte très cher à l'œil nu.", "Latin"),
        ("Небо синее, sky.", "Cyrillic"),  # noqa: RUF001 (letters that look like Latin ones)
        ("السماء زرقاء", "Arabic"),
        ("השמיים כחולים", "Hebrew"),
        ("आकाश नीला है", "Devanagari"),
        ("天空是蓝色的", "Han"),
        ("空が青いのはなぜですか", "Japanese"),
        ("하늘은 왜 파란가요", "Hangul"),
        ("ท้องฟ้าสีฟ้า", "Thai"),
        ("12 + 34 = 46", "no letters"),
        ("🙂 … €", "no letters"),
        ("", "no letters"),
        ("\ud800", "no letters"),
    ],
)
def test_the_script_of_most_letters_is_told(text, script):
    assert script_of(text) == script
