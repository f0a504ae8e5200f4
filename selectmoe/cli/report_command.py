"""`selectmoe report`: writes report.html of a finished run, as every stage does at its end."""

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
    """Raises SelectMoeError where RUN is no finished run, or matplotlib is missing."""
    parser = CommandParser(
        prog="selectmoe report",
        description="Write report.html into the folder of a finished run: a selection, a gate "
        "warm-up, a finetuning run or a comparison of evaluations.",
    )
    parser.add_argument("run", metavar="RUN", help="Output folder of the run.")
    parser.add_argument(
        "--detail",
        choices=("tokens", "rows"),
        default="tokens",
        help="Example rows of a selection with the score of each token, or their texts alone "
        "(default: tokens).",
    )
    options = parser.parse_args(list(arguments))
    from selectmoe.corpus.map_items import map_in_threads

    run = absolute_path(options.run, "RUN")
    print(write(run, detail=options.detail, on_gpu=True, map_items=map_in_threads))


def write(run: Path, *, detail: str, on_gpu: bool, map_items: "MapItems") -> Path:
    """The report's file, by what the folder holds. detail: "tokens" or "rows" of a selection."""
    from selectmoe.report.comparison_report import TABLE_FILE, write_comparison_report
    from selectmoe.report.selection_report import write_report
    from selectmoe.report.token_scores import token_scorer
    from selectmoe.report.training_report import write_training_report
    from selectmoe.training.metrics_lines import METRICS_NAME

    if (run / TABLE_FILE).is_file():
        return write_comparison_report(run)
    if (run / METRICS_NAME).is_file():
        return write_training_report(run)
    open_scorer = partial(token_scorer, on_gpu=on_gpu) if detail == "tokens" else None
    written = write_report(run, open_scorer=open_scorer, map_items=map_items)
    logger.info("report.html took %.1f s", written.seconds)
    return written.file


def report_of_stage(run: Path) -> None:
    """Writes the report of a training or a comparison that has just finished, and logs its path."""
    from selectmoe.corpus.map_items import map_in_threads
    from selectmoe.errors import DataError

    if not has_matplotlib(run):
        return
    try:
        file = write(run, detail="rows", on_gpu=False, map_items=map_in_threads)
    except DataError as error:  # as a training without a logged step; its results are complete
        logger.info("no report.html: %s", error)
    else:
        logger.info("report: %s", file)


def report_of_run(config: SelectConfig, output: Path, runner: "Runner", *, on_gpu: bool) -> None:
    """Writes the report of a selection that has just finished, and prints its path."""
    if config.report == "none":
        return
    if not has_matplotlib(output):
        return
    from selectmoe.selection.run_folder import RunFolder

    scored = RunFolder(Path(config.scored) if config.scored else output)
    print(
        write(
            output,
            detail=config.report,
            # Stored scores need no model, and a large one is not loaded for the report alone.
            on_gpu=on_gpu and config.scored is None,
            map_items=runner.map_over_scores(scored),
        )
    )


def has_matplotlib(run: Path) -> bool:
    """Logs one line where it is missing: the run is complete all the same."""
    from selectmoe.errors import ConfigError
    from selectmoe.report.charts import require_matplotlib

    try:
        require_matplotlib()
    except ConfigError as error:
        logger.warning("%s; then 'selectmoe report %s'", error, run)
        return False
    return True
