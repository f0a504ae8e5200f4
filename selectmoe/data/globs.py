"""Patterns of paths: `*`, `?`, `[ab]`, `{a,b}` and `**`, component by component.

A component that exists under its own name is that file or folder, whatever letters it has.
"""

import os
import re
from collections.abc import Iterator, Sequence

import pyarrow.fs as pafs

from selectmoe.data.folders import is_hidden

_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_pattern(path: str) -> bool:
    return _MAGIC.search(path) is not None


def match_pattern(filesystem: pafs.FileSystem, pattern: str) -> tuple[str, list[str]]:
    """The folder above all matches that no pattern names, and the files and folders that match,
    each once. Raises what the file system raises."""
    matches: dict[str, None] = {}
    for alternative in _alternatives(filesystem, pattern):
        matches.update(dict.fromkeys(_match(filesystem, *_split(filesystem, alternative))))
    return _split(filesystem, pattern)[0], list(matches)


def _alternatives(filesystem: pafs.FileSystem, pattern: str) -> Iterator[str]:
    """part-{a,b}.jsonl -> part-a.jsonl, part-b.jsonl; a name that exists with braces stays."""
    for braces in _BRACES.finditer(pattern):
        end = pattern.find("/", braces.end())
        upto = pattern if end < 0 else pattern[:end]
        if is_pattern(upto[: braces.start()]) or not _exists(filesystem, upto):
            for choice in braces[1].split(","):
                inner = pattern[: braces.start()] + choice + pattern[braces.end() :]
                yield from _alternatives(filesystem, inner)
            return
    yield pattern


def _split(filesystem: pafs.FileSystem, pattern: str) -> tuple[str, list[str]]:
    """The folder above the first component that is a pattern, or that is the last, and the rest."""
    parts = [part for part in pattern.split("/") if part]
    folder = "/" if pattern.startswith("/") else ""
    while len(parts) > 1:
        inner = _join(folder, parts[0])
        if is_pattern(parts[0]) and not _exists(filesystem, inner):
            break
        folder, parts = inner, parts[1:]
    return folder, parts


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _match(filesystem: pafs.FileSystem, folder: str, parts: Sequence[str]) -> Iterator[str]:
    if not parts:
        if _exists(filesystem, folder):
            yield folder
        return
    first, *rest = parts
    literal = _join(folder, first)
    if not is_pattern(first) or _exists(filesystem, literal):
        yield from _match(filesystem, literal, rest)
    elif "**" in first:
        yield from _match_below(filesystem, folder, "/".join(parts))
    else:
        expression = re.compile(_expression(first), re.DOTALL)
        for path, is_folder in _children(filesystem, folder):
            name = path.rpartition("/")[2]
            hides = is_hidden(name) and not is_hidden(first)
            if expression.fullmatch(name) and not hides and (is_folder or not rest):
                yield from _match(filesystem, path, rest)


def _match_below(filesystem: pafs.FileSystem, folder: str, pattern: str) -> Iterator[str]:
    """The files and folders below `folder` whose path there matches; `**` crosses folders."""
    expression = re.compile(_expression(pattern), re.DOTALL)
    for path in _descendants(filesystem, folder):
        below = path[len(folder) :].lstrip("/")
        hides = any(map(is_hidden, below.split("/")))
        if not hides and expression.fullmatch(below):
            yield path


def _children(filesystem: pafs.FileSystem, folder: str) -> list[tuple[str, bool]]:
    """The paths in a folder, in their order, and whether each is a folder; none of no folder."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        if not os.path.isdir(folder):
            return []
        paths = [_join(folder, name) for name in sorted(os.listdir(folder))]
        return [(path, os.path.isdir(path)) for path in paths]
    selector = pafs.FileSelector(folder, allow_not_found=True)
    infos = sorted(filesystem.get_file_info(selector), key=lambda info: info.path)
    return [(info.path, info.type == pafs.FileType.Directory) for info in infos]


def _descendants(filesystem: pafs.FileSystem, folder: str) -> Iterator[str]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        visited = {os.path.realpath(folder)}
        for parent, folders, names in os.walk(folder, followlinks=True):
            new = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
            folders[:] = [name for name, real in new.items() if real not in visited]
            visited.update(new.values())
            yield from (os.path.join(parent, name) for name in sorted([*folders, *names]))
        return
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
    yield from sorted(info.path for info in filesystem.get_file_info(selector))


def _exists(filesystem: pafs.FileSystem, path: str) -> bool:
    [info] = filesystem.get_file_info([path])
    return bool(info.type != pafs.FileType.NotFound)


def _expression(pattern: str) -> str:
    """`**` crosses folders; `*`, `?` and `[!a]` do not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(token: str) -> str:
        if not re.fullmatch(r"\[.+\]", token, re.DOTALL):
            return pieces.get(token, re.escape(token))
        excludes = token[1] in "!^" and len(token) > 3
        letters = re.sub(r"([\\\[\]&~|^])", r"\\\1", token[1 + excludes : -1])
        return f"[^/{letters}]" if excludes else f"[{letters}]"

    # A bracket right after the opening one, or after [!, is a letter of the class.
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^]]*\])", pattern)
    return "".join(map(translate, tokens))
