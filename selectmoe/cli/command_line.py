"""What every command shares: quiet logs, dotted overrides, and one clear line for a mistake."""

import argparse
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeGuard

from selectmoe.config.loading import StageConfig
from selectmoe.config.options import add_options, settings_help
from selectmoe.errors import SelectMoeError

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
_OVERRIDE = re.compile(r"[a-z_][a-z0-9_.]*=")


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `main(arguments)` and leaves the process with a status; a user's mistake is one line."""
    configure_logging()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_STATUS)
    except Exception as error:
        if not is_user_mistake(error):
            raise
        _leave(f"error: {one_line(error)}", USER_ERROR_STATUS)
    sys.exit(0)


def is_user_mistake(error: BaseException) -> TypeGuard[SelectMoeError | OSError]:
    """True for what a user can mend. A full disk or a missing permission, which name a file,
    count too."""
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return True
    return isinstance(error, SelectMoeError)


def one_line(mistake: SelectMoeError | OSError) -> str:
    if isinstance(mistake, OSError) and not isinstance(mistake, SelectMoeError):
        return f"{mistake.filename}: {mistake.strerror}"
    return " ".join(str(mistake).split())


def configure_logging() -> None:
    """Our own lines at INFO; the libraries speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("selectmoe", "jobs", "serve"):
        logging.getLogger(package).setLevel(logging.INFO)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        _leave(f"error: {message} (see {self.prog} --help)", USER_ERROR_STATUS)


def stage_parser(
    prog: str,
    description: str,
    config_class: type[StageConfig],
    options: Mapping[str, str] = types.MappingProxyType({}),
) -> CommandParser:
    """A parser with options for settings, {"--data": "dataset.paths"}; its --help ends with every
    setting of the stage."""
    parser = CommandParser(
        prog=prog,
        description=description,
        epilog="settings:\n" + settings_help(config_class),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, config_class, options)
    return parser


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
