"""`selectmoe calibrate`: writes the calibration of a selector, from scores of a corpus."""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from selectmoe.cli.command_line import parse_config
from selectmoe.config.calibrate import CalibrateConfig
from selectmoe.errors import ConfigError, DataError

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from selectmoe.records import RejectedRow, Sample

logger = logging.getLogger(__name__)

OPTIONS = {
    "--data": "data",
    "--model": "model",
    "--model-checkpoint-path": "model_checkpoint_path",
}


def main(arguments: Sequence[str]) -> None:
    """Raises SelectMoeError for what the user can mend."""
    prog = "selectmoe calibrate"
    config = parse_config(CalibrateConfig, arguments, prog=prog, options=OPTIONS, paths={})
    if not config.data:
        raise ConfigError("no rows to score: give --data with the corpus of the warm-up")
    from selectmoe.data.readers import read_corpora, require_readable
    from selectmoe.model.selector_files import find_selector
    from selectmoe.paths import model_or_embedded

    require_readable(config.data)
    model = model_or_embedded(config.model)
    files = find_selector(model, config.model_checkpoint_path)
    files.require_readable()
    folder = files.calibration_folder()
    if not folder.is_dir():
        raise ConfigError(
            f"calibration.json is written beside the weights: --model must be a folder, got {model}"
        )
    rows = told_of_rejected(read_corpora(config.data))
    samples = sample_rows(rows, config.num_rows, seed=config.seed)
    from selectmoe.scoring.calibration import save_calibration
    from selectmoe.scoring.engine import ScoringEngine
    from selectmoe.warmup.calibration import calibrate_on

    engine = ScoringEngine.from_pretrained(
        model,
        model_checkpoint_path=config.model_checkpoint_path,
        config=config.scoring,
        calibration=None,
        signals=(),  # a calibration is of scores alone
    )
    print(save_calibration(folder, calibrate_on(engine, samples)))


def told_of_rejected(rows: "Iterable[Sample | RejectedRow]") -> "Iterator[Sample]":
    """The valid rows; at the end a warning counts the others, and says why the first was none."""
    from selectmoe.records import RejectedRow

    rejected: list[RejectedRow] = []
    num_rejected = 0
    for row in rows:
        if isinstance(row, RejectedRow):
            num_rejected += 1
            rejected = rejected or [row]
        else:
            yield row
    for first in rejected:
        place = f"{first.file}:{first.row}"
        logger.warning("%d rows are not read; the first: %s: %s", num_rejected, place, first.detail)


def sample_rows(rows: "Iterable[Sample]", num_rows: int, *, seed: int) -> "list[Sample]":
    """At most `num_rows` of the rows, each with the same probability, without holding the
    others in memory: reservoir sampling (Vitter 1985, algorithm R), in the order of the corpus.

    Raises DataError where there is no row.
    """
    kept: list[tuple[int, Sample]] = []
    draw = random.Random(seed)
    for number, row in enumerate(rows):
        if number < num_rows:
            kept.append((number, row))
        elif (place := draw.randrange(number + 1)) < num_rows:
            kept[place] = (number, row)
    if not kept:
        raise DataError("no row to calibrate on: every file is empty or every row is invalid")
    return [row for _, row in sorted(kept, key=lambda numbered: numbered[0])]
