"""Finds the files of a corpus: paths, folders, globs, and the same in object stores."""

import difflib
import os
import re
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from selectmoe.data.formats import READERS, find_ending, require_ending
from selectmoe.errors import DataError, one_line

GCS_RETRY_SECONDS = 15


def locate(spec: str) -> tuple[pafs.FileSystem, str]:
    """The file system of `spec`, and its path there. Raises DataError where it is unreachable."""
    if "://" not in spec:
        if not spec:
            raise DataError("a corpus must be a file, a folder, a glob, a URL or hub:NAME, got ''")
        return pafs.LocalFileSystem(), str(Path(spec).expanduser().absolute())
    try:
        return _from_url(spec)
    except Exception as error:  # as in `translate_errors`
        raise DataError(f"{spec}: cannot be reached: {one_line(error)}") from error


def _from_url(url: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = pafs.FileSystem.from_uri(quote_url(url))
        return filesystem, path
    except NotImplementedError:
        pass  # Arrow was built without this store
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def quote_url(url: str) -> str:
    """Quotes what a glob or a name may hold and a URL may not; keeps Arrow's settings.

    s3://b/part-?[ab].jsonl?region=eu-west-1 -> s3://b/part-%3F%5Bab%5D.jsonl?region=eu-west-1
    """
    match = re.search(r"\?\w+=.*", url, re.DOTALL)
    settings = match[0] if match else ""
    address = url.removesuffix(settings)
    if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in settings:
        # Without a network or credentials Arrow would try for 15 minutes.
        settings += f"{'&' if settings else '?'}retry_limit_seconds={GCS_RETRY_SECONDS}"
    return quote(address, safe="/:@%*!$&'()+,;=~") + settings


def list_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    """The files that `read_corpus` reads of `spec`, in its order. Raises DataError as it does."""
    try:
        files = _matching_files(filesystem, path, spec)
    except DataError:
        raise
    except Exception as error:  # as in `translate_errors`
        raise DataError(f"{spec}: cannot be listed: {one_line(error)}") from error
    readable = sorted((file for file in files if find_ending(file)), key=_natural_key)
    if not readable:
        raise DataError(f"{spec}: nothing readable: no {', '.join(READERS)} file in it")
    for file in readable:
        if not _is_encodable(file):
            raise DataError(f"{spec}: the name of a file must be valid UTF-8, got {file!r}")
    return readable


def _matching_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    if not _is_encodable(path):
        raise DataError(f"{path!r}: the name of a file must be valid UTF-8")
    [info] = filesystem.get_file_info([path])
    if info.type == pafs.FileType.File:
        require_ending(path)
        return [path]
    if info.type != pafs.FileType.NotFound:
        return _walk(filesystem, path)
    if not any(letter in path for letter in "*?["):
        near = _suggestion(path) if isinstance(filesystem, pafs.LocalFileSystem) else ""
        raise DataError(f"{spec}: no such file or folder{near}")
    files = _match_glob(filesystem, path)
    if not files:
        raise DataError(f"{spec}: no file matches the pattern")
    return files


def _walk(filesystem: pafs.FileSystem, folder: str, *, recursive: bool = True) -> list[str]:
    if isinstance(filesystem, pafs.LocalFileSystem):
        files = _walk_local(folder, recursive=recursive)
    else:
        infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive))
        files = [info.path for info in infos if info.type == pafs.FileType.File]
    # As in Spark and Ray, files and folders whose names begin with . or _ are skipped.
    return [
        file
        for file in files
        if not any(part[0] in "._" for part in Path(file).relative_to(folder).parts)
    ]


def _walk_local(folder: str, *, recursive: bool) -> list[str]:
    """Lists files as Arrow does, but Arrow hides dead links and follows a loop 40 times."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    visited = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        files += [os.path.join(parent, name) for name in names]
        inner = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in inner.items() if recursive and real not in visited]
        visited.update(inner.values())
    return files


def _match_glob(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    fixed = str(Path(re.split(r"[*?\[]", pattern, maxsplit=1)[0] + "x").parent)
    [info] = filesystem.get_file_info([fixed])
    if info.type != pafs.FileType.Directory:
        return []
    below = pattern[len(fixed) :].lstrip("/")
    files = _walk(filesystem, fixed, recursive="/" in below or "**" in below)
    expression = re.compile(_glob_expression(pattern))
    return [file for file in files if expression.fullmatch(file)]


def _glob_expression(pattern: str) -> str:
    """`**` crosses folders; `*`, `?` and `[!a]` do not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(token: str) -> str:
        if not re.fullmatch(r"\[.+\]", token):
            return pieces.get(token, re.escape(token))
        letters = token[1:-1].replace("\\", r"\\")
        return f"[^/{letters[1:]}]" if letters.startswith("!") else f"[{letters}]"

    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return "".join(map(translate, tokens))


def _natural_key(path: str) -> tuple[list[tuple[int, str]], str]:
    """Orders part-2 before part-10; the path itself orders part-1 and part-01."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path


def _suggestion(path: str) -> str:
    parent = Path(path).parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 reach Python as lone surrogates
        return False
    return True
