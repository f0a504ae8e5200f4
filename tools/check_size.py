"""The size budget of the house: `python tools/check_size.py [FOLDER …]`, a part of `make check`.

No function over 60 lines, nine in ten at most 25 (of all but tests, whose many short ones would
hide long ones), no file over 400. Prints one line a folder, the lines of the product and one line a
breach; the status is 1 where there is a breach. The share of comments is only reported: the right
one depends on the file.
"""

import ast
import io
import math
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FUNCTION_LINES_P90 = 25
MAX_FILE_LINES = 400
PRODUCT = ("selectmoe", "jobs", "serve")
TESTS = "tests"
FOLDERS = (*PRODUCT, "examples", "tools", "benchmarks", "recipes", TESTS)


@dataclass(frozen=True, slots=True)
class FileSize:
    """What one source file weighs."""

    path: Path
    num_lines: int
    num_comment_lines: int  # lines that hold a comment, also behind code; docstrings not counted
    function_lines: dict[str, int]  # "name:line" -> lines, from its `def` to its end


def measure(path: Path) -> FileSize:
    """Counts one file; a function inside another counts for both."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return FileSize(
        path=path,
        num_lines=len(source.splitlines()),
        num_comment_lines=sum(token.type == tokenize.COMMENT for token in tokens),
        function_lines={
            f"{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        },
    )


def percentile_90(lengths: Iterable[int]) -> int:
    """The length that nine in ten do not exceed; 0 where there is none."""
    ordered = sorted(lengths)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else 0


def breaches(files: Sequence[FileSize]) -> Iterator[str]:
    """One sentence for each breach."""
    for file in files:
        if file.num_lines > MAX_FILE_LINES:
            yield f"{file.path}: {file.num_lines} lines, at most {MAX_FILE_LINES}"
        for name_and_line, num_lines in file.function_lines.items():
            if num_lines > MAX_FUNCTION_LINES:
                name, line = name_and_line.split(":")
                place = f"{file.path}:{line}"
                yield f"{place}: {name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
    others = [file for file in files if TESTS not in file.path.parts]
    p90 = percentile_90(lines for file in others for lines in file.function_lines.values())
    if p90 > MAX_FUNCTION_LINES_P90:
        yield f"function p90 is {p90} lines, at most {MAX_FUNCTION_LINES_P90}"


def summary(folder: str, files: Sequence[FileSize]) -> str:
    """One line of counts about a folder."""
    functions = [lines for file in files for lines in file.function_lines.values()]
    num_lines = sum(file.num_lines for file in files)
    comments = sum(file.num_comment_lines for file in files) / max(num_lines, 1)
    return (
        f"{folder:<10} {len(files):>3} files {num_lines:>6} lines, "
        f"longest file {max(file.num_lines for file in files):>3}, {len(functions):>3} functions: "
        f"p90 {percentile_90(functions):>2}, longest {max(functions, default=0):>2}; "
        f"comments {comments:.0%}"
    )


def main(folders: Sequence[str]) -> int:
    """Prints the report; returns the exit status."""
    sizes = {
        folder: [measure(path) for path in sorted(Path(folder).rglob("*.py"))] for folder in folders
    }
    for folder, files in sizes.items():
        if files:
            print(summary(folder, files))
    product = [file.num_lines for folder in PRODUCT for file in sizes.get(folder, [])]
    if product:
        print(f"product lines ({', '.join(PRODUCT)}): {sum(product):,}")
    found = list(breaches([file for files in sizes.values() for file in files]))
    for breach in found:
        print(f"over the size budget: {breach}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or FOLDERS))
