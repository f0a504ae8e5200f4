"""Finds the files of a corpus: paths, folders, globs, and the same in object stores."""

import difflib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs

from selectmoe.data.endings import READABLE, find_ending, require_ending
from selectmoe.data.folders import (
    CONFIG_NAME,
    FolderContents,
    is_output_file,
    list_folder,
)
from selectmoe.data.globs import is_pattern, match_pattern
from selectmoe.errors import DataError, one_line

GCS_RETRY_SECONDS = 15


def locate(spec: str) -> tuple[pafs.FileSystem, str]:
    """The file system of `spec`, and its path there. Raises DataError where it is unreachable."""
    if "://" not in spec and not spec.startswith("file:/"):
        if not spec:
            raise DataError("a corpus must be a file, a folder, a glob, a URL or hub:NAME, got ''")
        return pafs.LocalFileSystem(), str(Path(spec).expanduser().absolute())
    if re.match("file:/", spec, re.IGNORECASE):
        return pafs.LocalFileSystem(), _path_of_url(spec)
    try:
        return _from_url(spec)
    except Exception as error:  # as in `translate_errors`
        raise DataError(f"{spec}: cannot be reached: {one_line(error)}") from error


def _path_of_url(url: str) -> str:
    """The path of a file URL, whose %41 may be the letter A or, as people type it, a name."""
    address = re.sub("^file:(//(localhost)?)?", "", url, flags=re.IGNORECASE)
    typed = "/" + address.lstrip("/")
    decoded = unquote(typed)
    spelled = (path for path in (decoded, typed) if os.path.exists(_fixed_part(path)))
    return os.path.normpath(next(spelled, decoded))


def _fixed_part(path: str) -> str:
    """The path itself where it exists; else what is before the first letter of a pattern."""
    if os.path.lexists(path) or not is_pattern(path):
        return path
    return re.split(r"[*?\[{]", path, maxsplit=1)[0].rpartition("/")[0] or "/"


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


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """What one corpus consists of, in the order in which it is read."""

    files: list[str]
    root: str  # the folder below which files are named
    contents: FolderContents = field(default_factory=FolderContents)


def list_files(filesystem: pafs.FileSystem, path: str, spec: str) -> list[str]:
    """The files that `read_corpus` reads of `spec`, in its order. Raises DataError as it does."""
    return find_files(filesystem, path, spec).files


def find_files(filesystem: pafs.FileSystem, path: str, spec: str) -> FoundFiles:
    """The files of a corpus, and what of its folders is not read. Raises DataError where there is
    nothing to read."""
    try:
        found = _find(filesystem, path, spec)
    except DataError:
        raise
    except Exception as error:  # as in `translate_errors`
        raise DataError(f"{spec}: cannot be listed: {one_line(error)}") from error
    if not found.files:
        outputs = len(found.contents.outputs)
        passed = f" ({outputs} folders of runs are passed over)" if outputs else ""
        raise DataError(f"{spec}: nothing readable: no {READABLE} file in it{passed}")
    for file in found.files:
        if not _is_encodable(file):
            raise DataError(f"{spec}: the name of a file must be valid UTF-8, got {file!r}")
    return found


def _find(filesystem: pafs.FileSystem, path: str, spec: str) -> FoundFiles:
    if not _is_encodable(path):
        raise DataError(f"{path!r}: the name of a file must be valid UTF-8")
    [info] = filesystem.get_file_info([path])
    if info.type == pafs.FileType.File:
        require_ending(path)
        return FoundFiles([path], os.path.dirname(path))
    if info.type == pafs.FileType.Directory:
        return _of_folder(filesystem, path, spec)
    if info.type == pafs.FileType.NotFound and is_pattern(path):
        return _of_pattern(filesystem, path, spec)
    if info.type != pafs.FileType.NotFound:
        raise DataError(
            f"{spec}: must be a file or a folder, is a named pipe, a device or a socket; write the "
            "rows into a file first"
        )
    if not isinstance(filesystem, pafs.LocalFileSystem):
        raise DataError(f"{spec}: no such file or folder")
    if os.path.islink(path):
        raise DataError(f"{spec}: is a link to {os.readlink(path)}, which does not exist")
    raise DataError(f"{spec}: no such file or folder{_suggestion(path)}")


def _of_folder(filesystem: pafs.FileSystem, folder: str, spec: str) -> FoundFiles:
    if isinstance(filesystem, pafs.LocalFileSystem) and is_output_file(f"{folder}/{CONFIG_NAME}"):
        raise DataError(
            f"{spec}: is the folder of a run or of a model, not of a corpus; a selection is its "
            "selected_data.jsonl"
        )
    contents = list_folder(filesystem, folder)
    return FoundFiles(sorted(contents.files, key=_natural_key), folder, contents)


def _of_pattern(filesystem: pafs.FileSystem, pattern: str, spec: str) -> FoundFiles:
    """The files that match, and those below the folders that do."""
    root, matches = match_pattern(filesystem, pattern)
    if not matches:
        raise DataError(f"{spec}: no file matches the pattern")
    contents = FolderContents()
    # A name that the pattern spells out is meant, as in outputs/*/*/*/selected_data.jsonl.
    is_named = not is_pattern(pattern.rpartition("/")[2])
    known: dict[str, bool] = {}
    for info in filesystem.get_file_info(matches):
        output = None if is_named else _output_above(filesystem, info.path, root, known)
        if output is not None:
            contents.outputs.append(output)
        elif info.type == pafs.FileType.Directory:
            contents.add(list_folder(filesystem, info.path))
        elif find_ending(info.path) and (info.type == pafs.FileType.File):
            contents.files.append(info.path)
        else:
            contents.left_over.append(info.path)
    for paths in (contents.files, contents.left_over, contents.outputs, contents.linked):
        paths[:] = dict.fromkeys(paths)
    return FoundFiles(sorted(contents.files, key=_natural_key), root, contents)


def _output_above(
    filesystem: pafs.FileSystem, path: str, root: str, known: dict[str, bool]
) -> str | None:
    """The outermost folder of a run or model from `root` down to `path`, or None.

    known: which folders are one, as far as they were looked at.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return None
    for folder in reversed([path, *map(str, Path(path).parents)]):
        if len(folder) > len(root):
            if folder not in known:
                known[folder] = is_output_file(f"{folder}/{CONFIG_NAME}")
            if known[folder]:
                return folder
    return None


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
