"""The reasons for which rows are rejected are those that docs/operations.md lists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# Where the reason stands among the arguments of what makes a rejection.
POSITIONS = {"RowError": 0, "reject": 0, "UnscoredSample": 1}


def reasons_of(file: Path) -> Iterator[str]:
    """Every reason that a file writes down as text."""
    for call in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(call, ast.FunctionDef):  # the reason that an error has unless it is given one
            defaults = zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True)
            names = [value for argument, value in defaults if argument.arg == "reason"]
            yield from (g.value for g in names if isinstance(g, ast.Constant) and g.value)
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
        if name in POSITIONS:
            given += call.args[POSITIONS[name] :][:1]
        yield from (g.value for g in given if isinstance(g, ast.Constant) and g.value)


def test_every_reason_is_documented_and_every_documented_one_is_given(repository):
    files = (repository / "selectmoe").rglob("*.py")
    given = {reason for file in files for reason in reasons_of(file)}
    text = (repository / "docs" / "operations.md").read_text("utf-8")
    section = text.partition("## Rejected rows")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {reason for cell in cells for reason in re.findall(r"`(\w+)`", cell)}
    assert {"invalid_json", "chat_template", "too_long"} <= given
    assert documented == given
