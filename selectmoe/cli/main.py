"""The command `selectmoe`, whose subcommands run in one process without Ray."""

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from selectmoe import __version__
from selectmoe.cli.command_line import CommandParser, run_command

COMMANDS = {
    "select": ("select_command", "Score a corpus and keep exactly the best share of it."),
    "report": ("report_command", "Write report.html of a finished run."),
    "score": ("score_command", "Print the score of each row of a corpus."),
    "calibrate": ("calibrate_command", "Write the calibration of a selector."),
    "convert": ("convert_command", "Add quality gates to an OLMoE checkpoint."),
    "info": ("info_command", "Describe this installation, or a selector."),
}
USAGE = """usage: selectmoe COMMAND [options] [key=value ...]

{commands}

`selectmoe COMMAND --help` lists the options and settings of a command. The other stages,
and stage 2 on a cluster, run on Ray: see the scripts in jobs/ of the repository."""


def main() -> None:
    # As in `jobs`, SIGTERM ends a run like Ctrl-C: with the line that says how to resume it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(run)


def run(arguments: Sequence[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command:<9}  {text}" for command, (_, text) in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)))
    elif name == "--version":
        print(f"selectmoe {__version__}")
    elif name in COMMANDS:
        import_module(f"selectmoe.cli.{COMMANDS[name][0]}").main(rest)
    else:
        parser = CommandParser(prog="selectmoe")
        parser.error(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    sys.stdout.flush()
