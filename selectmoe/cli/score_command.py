"""`selectmoe score`: prints the score of each row of a corpus as a line of JSON."""

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selectmoe.cli.command_line import parse_config
from selectmoe.cli.output_folder import absolute_path
from selectmoe.cli.progress import RowsProgress
from selectmoe.config.columns import ColumnRules
from selectmoe.config.score import ScoreConfig
from selectmoe.errors import ConfigError

if TYPE_CHECKING:  # --help and a mistyped option must not wait for these imports
    from selectmoe.records import (
        RejectedRow,
        Sample,
        SampleSignals,
        ScoredSample,
        UnscoredSample,
    )
    from selectmoe.scoring.engine import ScoringEngine

STANDARD_INPUT = "-"
OPTIONS = {
    "--data": "data",
    "--model": "model",
    "--model-checkpoint-path": "model_checkpoint_path",
    "--output": "output",
}
ROWS_AT_A_TIME = 512


def main(arguments: Sequence[str]) -> None:
    """Raises SelectMoeError for what the user can mend."""
    prog = "selectmoe score"
    config = parse_config(ScoreConfig, arguments, prog=prog, options=OPTIONS, paths={})
    if not config.data:
        raise ConfigError("no rows to score: give --data FILE, or --data - for standard input")
    with tempfile.TemporaryDirectory() as folder:
        if STANDARD_INPUT in config.data:
            config = _with_copied_input(config, Path(folder) / "stdin.jsonl")
        score_rows(config, hidden_folder=f"{folder}/")


def score_rows(config: ScoreConfig, *, hidden_folder: str) -> None:
    """Reads, scores and writes rows a few hundred at a time: memory does not grow with the corpus.

    hidden_folder: removed from the beginning of a row's source.
    Raises DataError where there is no row.
    """
    from selectmoe.data.readers import read_corpora, require_readable
    from selectmoe.data.writers import write_jsonl
    from selectmoe.errors import DataError
    from selectmoe.model.selector_files import find_selector
    from selectmoe.paths import model_or_embedded

    require_readable(config.data)
    model = model_or_embedded(config.model, config.revision)
    find_selector(model, config.model_checkpoint_path)  # before torch is imported
    from selectmoe.scoring.engine import ScoringEngine

    engine = ScoringEngine.from_pretrained(
        model,
        model_checkpoint_path=config.model_checkpoint_path,
        config=config.scoring,
    )
    rules = ColumnRules(config.columns, keeps_extra=False)
    lines = score_lines(engine, read_corpora(config.data, rules=rules), hidden_folder)
    num_rows = 0
    if config.output is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False), flush=True)
            num_rows += 1
    else:
        num_rows = write_jsonl(absolute_path(config.output, "--output"), _with_progress(lines))
    if not num_rows:
        raise DataError(f"{', '.join(config.data)}: no rows: every file is empty")


def score_lines(
    engine: "ScoringEngine", rows: "Iterable[Sample | RejectedRow]", hidden_folder: str
) -> Iterator[dict[str, Any]]:
    """The score of each row, null with a reason where there is none."""
    from selectmoe.records import RejectedRow

    left = iter(rows)
    while chunk := list(itertools.islice(left, ROWS_AT_A_TIME)):
        scored = iter(engine.score([row for row in chunk if not isinstance(row, RejectedRow)]))
        for row in chunk:
            outcome = row if isinstance(row, RejectedRow) else next(scored)
            source = f"{row.file}:{row.row}" if isinstance(row, RejectedRow) else row.source
            yield {
                "dataset": row.dataset,
                "id": row.sample_id,
                "source": source.removeprefix(hidden_folder),
                **_numbers(engine, outcome),
            }


def _numbers(
    engine: "ScoringEngine", outcome: "ScoredSample | UnscoredSample | RejectedRow"
) -> dict[str, Any]:
    from selectmoe.records import ScoredSample

    if not isinstance(outcome, ScoredSample):
        return {"score": None, "reason": outcome.reason, "detail": outcome.detail}
    calibration = engine.calibration
    return {
        "score": _shortest(outcome.score),
        "percentile": calibration.percentile(outcome.score) if calibration else None,
        "num_tokens": outcome.num_tokens,
        "num_answer_tokens": outcome.num_answer_tokens,
        "truncated": outcome.truncated,
        **_signals(outcome.signals, engine.signal_sizes),
    }


def _signals(
    signals: "SampleSignals | None", sizes: Mapping[str, int]
) -> dict[str, float | list[float] | None]:
    """Those that were asked for; null where there is no finite value."""
    values = {name: getattr(signals, name) for name in sizes}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else _shortest(value)
        for name, value in values.items()
    }


def _shortest(value: float | None) -> float | None:
    """The shortest decimal of this float32."""
    return None if value is None else float(str(np.float32(value)))


def _with_progress(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    progress = RowsProgress("scoring")
    for number, line in enumerate(lines, start=1):
        yield line
        if number % ROWS_AT_A_TIME == 0:
            progress(number, None)
    progress.close()


def _with_copied_input(config: ScoreConfig, file: Path) -> ScoreConfig:
    """Copies standard input into a file, so that it is read like any other corpus."""
    with file.open("wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
    paths = (str(file) if path == STANDARD_INPUT else path for path in config.data)
    return replace(config, data=tuple(paths))
