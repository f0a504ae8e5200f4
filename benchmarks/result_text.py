"""Formats the nested results of a benchmark as lines and tables."""

import itertools
from collections.abc import Iterator, Mapping, Sequence


def as_text(result: Mapping[str, object]) -> str:
    """One line per number; groups of groups as tables, whose longer side becomes the rows."""
    return "\n".join(_lines(result))


def _lines(given: Mapping[str, object], indent: str = "") -> Iterator[str]:
    group = {name: _numbered(value) for name, value in given.items()}
    width = max((len(_label(k)) for k, v in group.items() if not isinstance(v, Mapping)), default=0)
    for name, value in group.items():
        if not isinstance(value, Mapping):
            yield f"{indent}{_label(name):<{width}}  {_cell(value)}"
            continue
        yield f"{indent}{_label(name)}:"
        inner = f"{indent}  "
        if value and all(isinstance(part, Mapping) for part in value.values()):
            yield from _table({row: dict(_leaves(part)) for row, part in value.items()}, inner)
        else:
            yield from _lines(value, inner)


def _numbered(value: object) -> object:
    """A list of groups becomes a mapping from 1, 2, … to the groups."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return {str(number): part for number, part in enumerate(value, start=1)}
    return value


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields ("threads: seconds", "1.7"), … for all values nested in `value`."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, (*path, _label(name)))
    else:
        yield ": ".join(path), _cell(value)


def _table(rows: Mapping[str, Mapping[str, str]], indent: str) -> Iterator[str]:
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows.values())))
    grid = [["", *columns]]
    grid += [[_label(name), *(row.get(c, "") for c in columns)] for name, row in rows.items()]
    if len(columns) > len(rows):
        grid = list(map(list, zip(*grid, strict=True)))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for name, *cells in grid:
        line = "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        yield f"{indent}{line}".rstrip()


def _label(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_cell, value))
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{round(value, 4):,}"
    return f"{value:,}" if isinstance(value, int) else str(value)
