"""The language script of a text: Latin, Cyrillic, Han, …, by the script of most of its letters."""

from collections import Counter

import numpy as np

NO_LETTERS = "no letters"
OTHER = "other"
MAX_CHARACTERS = 2_000  # the beginning of a text tells its script

# The first code point of each block of letters and the script, in ascending order; a block ends
# where the next begins. None: no letters. By the blocks of the Unicode Standard 16.
_BLOCKS: tuple[tuple[int, str | None], ...] = (
    (0x0000, None), (0x0041, "Latin"), (0x005B, None), (0x0061, "Latin"), (0x007B, None),
    (0x00C0, "Latin"), (0x00D7, None), (0x00D8, "Latin"), (0x00F7, None), (0x00F8, "Latin"),
    (0x0250, "Latin"), (0x02B0, None), (0x0370, "Greek"), (0x0400, "Cyrillic"),
    (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, OTHER),
    (0x0750, "Arabic"), (0x0780, OTHER), (0x0900, "Devanagari"), (0x0980, "Bengali"),
    (0x0A00, "Gurmukhi"), (0x0A80, "Gujarati"), (0x0B00, "Odia"), (0x0B80, "Tamil"),
    (0x0C00, "Telugu"), (0x0C80, "Kannada"), (0x0D00, "Malayalam"), (0x0D80, "Sinhala"),
    (0x0E00, "Thai"), (0x0E80, "Lao"), (0x0F00, "Tibetan"), (0x1000, "Myanmar"),
    (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "Ethiopic"), (0x13A0, OTHER),
    (0x1780, "Khmer"), (0x1800, OTHER), (0x1E00, "Latin"), (0x1F00, "Greek"), (0x2000, None),
    (0x2C00, OTHER), (0x2E00, None), (0x3041, "Japanese"), (0x3100, OTHER), (0x3130, "Hangul"),
    (0x3190, None), (0x3400, "Han"), (0xA000, OTHER), (0xAC00, "Hangul"), (0xD7B0, None),
    (0xF900, "Han"), (0xFB00, "Latin"), (0xFB13, OTHER), (0xFB1D, "Hebrew"), (0xFB50, "Arabic"),
    (0xFE00, None), (0xFE70, "Arabic"), (0xFEFF, None), (0xFF21, "Latin"), (0xFF3B, None),
    (0xFF41, "Latin"), (0xFF5B, None), (0xFF66, "Japanese"), (0xFFA0, "Hangul"), (0xFFE0, None),
    (0x10000, OTHER), (0x1D400, None), (0x1E000, OTHER), (0x1F000, None), (0x20000, "Han"),
    (0x323B0, None),
)  # fmt: skip
_STARTS = np.array([start for start, _ in _BLOCKS], dtype=np.uint32)
_NAMES = [name for _, name in _BLOCKS]


def script_of(text: str) -> str:
    """The script of most letters; "Japanese" as soon as a tenth are kana, beside any Han."""
    beginning = text[:MAX_CHARACTERS]
    if beginning.isascii():
        return "Latin" if any(map(str.isalpha, beginning)) else NO_LETTERS
    # A lone half of a surrogate pair has no code point of its own.
    codes = np.frombuffer(beginning.encode("utf-32-le", "replace"), dtype=np.uint32)
    blocks = np.bincount(
        np.searchsorted(_STARTS, codes, side="right") - 1, minlength=len(_BLOCKS)
    ).tolist()
    counts: Counter[str] = Counter()
    for name, count in zip(_NAMES, blocks, strict=True):
        if name is not None and count:
            counts[name] += count
    if not counts:
        return NO_LETTERS
    if 10 * counts["Japanese"] >= counts["Japanese"] + counts["Han"] > 0:
        counts["Japanese"] += counts.pop("Han", 0)
    return max(counts, key=lambda name: (counts[name], name))
