"""Draws the source tree in docs/architecture.md: `python tools/draw_architecture.py`.

The caption of a file is the first sentence of its docstring, that of a folder the one of its
`__init__.py`. Only what stands between the two marks is written; the rest of the page is kept.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "architecture.md"
FOLDERS = ("selectmoe", "jobs", "serve")
BEGIN, END = "<!-- tree: begin -->\n", "<!-- tree: end -->\n"
CAPTION_COLUMN = 34
WIDTH = 100


def caption(path: Path) -> str:
    """The first sentence of a module's docstring; empty where there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z`])", paragraph, maxsplit=1)[0]


def tree_lines(folder: Path, *, depth: int = 0) -> Iterator[str]:
    """A folder, then its files and the folders in it, each with its caption."""
    yield from _captioned(f"{folder.name}/", caption(folder / "__init__.py"), depth)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield from _captioned(path.name, caption(path), depth + 1)
    for path in sorted(folder.glob("*/__init__.py")):
        yield from tree_lines(path.parent, depth=depth + 1)


def _captioned(name: str, text: str, depth: int) -> list[str]:
    label = f"{'  ' * depth}{name}".ljust(CAPTION_COLUMN - 1) + " "
    if not text:
        return [label.rstrip()]
    later = " " * CAPTION_COLUMN
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=later)


def with_tree(page: str) -> str:
    """The page with its tree drawn anew."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page needs {BEGIN.strip()} and {END.strip()}"
    trees = "\n\n".join("\n".join(tree_lines(REPOSITORY / name)) for name in FOLDERS)
    return f"{before}{begin}\n```\n{trees}\n```\n\n{end}{after}"


def main() -> int:
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
