"""`selectmoe report`: writes report.html of a finished selection; every selection ends with it."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import CommandParser
from selectmoe.cli.output_folder import absolute_path
from selectmoe.config.selection import SelectConfig

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from selectmoe.corpus.map_items import MapItems
    from selectmoe.selection.stage import Runner

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Raises SelectMoeError where RUN is no finished selection, or matplotlib is missing."""
    parser = CommandParser(
        prog="selectmoe report",
        description="Write report.html into the folder of a finished selection.",
    )
    parser.add_argument("run", metavar="RUN", help="Output folder of the selection.")
    parser.add_argument(
        "--detail",
        choices=("tokens", "rows"),
        default="tokens",
        help="Example rows with the score of each token, or their texts alone (default: tokens).",
    )
    options = parser.parse_args(list(arguments))
    from selectmoe.corpus.map_items import map_in_threads

    run = absolute_path(options.run, "RUN")
    print(write(run, detail=options.detail, on_gpu=True, map_items=map_in_threads))


def write(run: Path, *, detail: str, on_gpu: bool, map_items: "MapItems") -> Path:
    """The report's file. detail: "tokens" or "rows"."""
    from selectmoe.report.selection_report import write_report
    from selectmoe.report.token_scores import token_scorer

    open_scorer = partial(token_scorer, on_gpu=on_gpu) if detail == "tokens" else None
    written = write_report(run, open_scorer=open_scorer, map_items=map_items)
    logger.info("report.html took %.1f s", written.seconds)
    return written.file


def report_of_run(config: SelectConfig, output: Path, runner: "Runner", *, on_gpu: bool) -> None:
    """Writes the report of a run that has just finished and prints its path.

    Without matplotlib the run is complete all the same: one line says what is missing.
    """
    if config.report == "none":
        return
    from selectmoe.errors import ConfigError
    from selectmoe.report.charts import require_matplotlib
    from selectmoe.selection.run_folder import RunFolder

    try:
        require_matplotlib()
    except ConfigError as error:
        logger.warning("%s; then 'selectmoe report %s'", error, output)
        return
    scored = RunFolder(Path(config.scored) if config.scored else output)
    print(
        write(
            output,
            detail=config.report,
            on_gpu=on_gpu,
            map_items=runner.map_over_scores(scored),
        )
    )
