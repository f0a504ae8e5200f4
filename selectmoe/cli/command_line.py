"""Parses options and overrides, configures logging and reports errors, for all commands."""

import argparse
import gc
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeGuard

from selectmoe.cli.output_folder import values_given
from selectmoe.config.loading import Config, from_values, load_config, resolved
from selectmoe.config.options import add_options, settings_help
from selectmoe.errors import DISK_IS_FULL, SelectMoeError, full_disk

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")  # control characters, half pairs, line and paragraph ends
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn text around
_OVERRIDE = re.compile(r"[a-z_][a-z0-9_.]*=")


def collect_garbage_less_often() -> None:
    """For a process that imports torch and transformers, which make a million objects that stay:
    passes over them take an eighth of the time at Python's threshold of 700 objects."""
    gc.set_threshold(50_000)


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `main(arguments)` and leaves the process with a status; a user's mistake is one line."""
    configure_logging()
    collect_garbage_less_often()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_STATUS)
    except Exception as error:
        mistake = error if is_user_mistake(error) else full_disk(error)
        if mistake is None:
            raise
        _leave(f"error: {one_line(mistake)}", USER_ERROR_STATUS)
    sys.exit(0)


def is_user_mistake(error: BaseException) -> TypeGuard[SelectMoeError | OSError]:
    """True for what a user can mend. A missing permission and the like, which name a file, count
    too, and a full disk, which a failed write reports without a name."""
    if isinstance(error, OSError) and error.errno is not None:
        return bool(error.filename) or error.errno in DISK_IS_FULL
    return isinstance(error, SelectMoeError)


def one_line(mistake: SelectMoeError | OSError) -> str:
    if isinstance(mistake, OSError) and not isinstance(mistake, SelectMoeError):
        named = f"{mistake.filename}: " if mistake.filename else ""
        return printable(named + (mistake.strerror or str(mistake)))
    return printable(" ".join(str(mistake).split()))


def printable(text: str) -> str:
    """The text with control characters, line breaks included, as escapes: "a\\x1b[2Jb".

    Names of datasets, files and rows are anybody's; a terminal would obey them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _CONTROLS or letter in _DIRECTIONS
        else letter
        for letter in text
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, the others to the right."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def configure_logging() -> None:
    """Our own lines at INFO; the libraries speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("selectmoe", "jobs", "serve"):
        logging.getLogger(package).setLevel(logging.INFO)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        _leave(f"error: {message} (see {self.prog} --help)", USER_ERROR_STATUS)


def parse_config(
    config_class: type[Config],
    arguments: Sequence[str],
    *,
    prog: str,
    options: Mapping[str, str],
    paths: Mapping[str, Callable[[str, str], object]],
) -> Config:
    """Options and `key=value` overrides as one checked configuration with absolute paths.

    options: those of settings, {"--data": "dataset.paths"}; --help ends with every setting.
    paths: what makes the path of a setting absolute, given it and the setting's name, since workers
    may run in another directory than the driver.
    """
    parser = CommandParser(
        prog=prog,
        description=config_class.__doc__,
        epilog="settings:\n" + settings_help(config_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, config_class, options)
    given, overrides = parse_arguments(parser, arguments)
    config = load_config(config_class, overrides, values=values_given(vars(given), config_class))
    settings, option_of = resolved(config), {key: option for option, key in options.items()}
    for key, absolute in paths.items():
        value, name = settings[key], option_of.get(key, key)
        if isinstance(value, list):
            settings[key] = [str(absolute(path, name)) for path in value]
        elif value is not None:
            settings[key] = str(absolute(value, name))
    return from_values(config_class, settings)


def parse_arguments(
    parser: CommandParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Options and `key=value` overrides, in any order."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Any setting listed below, in Hydra's override syntax.",
    )
    namespace = parser.parse_intermixed_args(list(arguments))
    overrides = list(vars(namespace).pop("overrides"))
    for name, entries in vars(namespace).items():
        if isinstance(entries, list):
            # An option of several values takes `seed=1` behind it for one more of them.
            swallowed = [entry for entry in entries if _is_override(entry)]
            setattr(namespace, name, [entry for entry in entries if entry not in swallowed] or None)
            overrides += swallowed
    return namespace, overrides


def _is_override(entry: str) -> bool:
    """True for `a.b=c`, unless there is a file of that name (year=2026/part-1.jsonl)."""
    return bool(_OVERRIDE.match(entry)) and not os.path.exists(entry)


def _leave(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)
