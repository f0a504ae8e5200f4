"""The signals of rated rows: scored now, or taken from a finished selection run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from selectmoe.config.engine import EngineConfig
from selectmoe.corpus.shards import read_shard, row_hashes
from selectmoe.errors import DataError
from selectmoe.paths import model_or_embedded
from selectmoe.ratings.rated_rows import RatedRow
from selectmoe.records import ScoredSample
from selectmoe.scoring.weighted_signals import column_of, signal_values
from selectmoe.selection.run_folder import RunFolder

FROM_MODEL = ("nll", "pmi", "router_entropy")  # which are stored where they are asked for
DEFAULT = ("gate", "nll", "pmi", "length")
ALWAYS = ("score", "num_answer_tokens")


@dataclass(frozen=True, slots=True, eq=False)  # == on arrays gives no single answer
class RowSignals:
    """The signals of N rows, as they are weighted."""

    values: Mapping[str, np.ndarray]
    """float64 (N,) by name, as `weighted_signals` has them; NaN where a row has none."""
    num_answer_tokens: np.ndarray
    """int64 (N,)."""


def score_signals(
    rows: Sequence[RatedRow],
    *,
    signals: Sequence[str],
    model: str | None,
    model_checkpoint_path: str | None,
    config: EngineConfig,
) -> RowSignals:
    """Scores the rows. Raises DataError where the selector rejects one."""
    from selectmoe.scoring.engine import ScoringEngine

    wanted = [name for name in FROM_MODEL if name in (signals or DEFAULT)]
    if "pmi" in wanted and "nll" not in wanted:
        wanted.append("nll")  # it is computed in any case, and is a baseline
    engine = ScoringEngine.from_pretrained(
        model_or_embedded(model),
        model_checkpoint_path=model_checkpoint_path,
        config=replace(config, signals=tuple(wanted)),
    )
    outcomes = engine.score([row.sample for row in rows])
    columns: dict[str, list[float]] = {name: [] for name in (*ALWAYS, *wanted)}
    for row, outcome in zip(rows, outcomes, strict=True):
        if not isinstance(outcome, ScoredSample):
            raise _rejected(row, outcome.detail)
        columns["score"].append(outcome.score)
        columns["num_answer_tokens"].append(outcome.num_answer_tokens)
        for name in wanted:
            value = getattr(outcome.signals, name)
            columns[name].append(np.nan if value is None else value)
    return _as_weighted(columns, signals or DEFAULT)


def stored_signals(rows: Sequence[RatedRow], folder: Path, signals: Sequence[str]) -> RowSignals:
    """Those that a selection run stored of the rows with the same text.

    Raises DataError for a row that the run did not score, and a signal that it did not store.
    """
    run = RunFolder(folder)
    stored = _stored_names(run, signals)
    names = (*ALWAYS, *stored)
    found = _find_rows(run, {row_hashes(row.sample)[1] for row in rows}, names)
    columns: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        values = found.get(row_hashes(row.sample)[1])
        if values is None:
            raise DataError(
                f"{row.sample.source}: {folder} scored no row with this text; leave --scored out "
                "to score the rated rows"
            )
        if values["score"] is None:
            raise _rejected(row, str(values["detail"]))
        for name in names:
            value = values[name]
            columns[name].append(np.nan if value is None else float(value))
    return _as_weighted(columns, signals or ("gate", *stored, "length"))


def _stored_names(run: RunFolder, signals: Sequence[str]) -> list[str]:
    shards = run.scored_shards()
    if not shards:
        raise DataError(f"{run.scored}: no scored shards")
    present = set(pq.read_schema(shards[0]).names)
    for name in signals:
        if name in FROM_MODEL and name not in present:
            raise DataError(
                f"{run.root}: the signal {name} is not stored; leave --scored out, or score the "
                f"corpus again with scoring.signals=[{name}]"
            )
    return [name for name in FROM_MODEL if name in present]


def _find_rows(
    run: RunFolder, wanted: set[bytes], names: Sequence[str]
) -> dict[bytes, dict[str, Any]]:
    """The stored values of the rows whose text has one of these hashes."""
    found: dict[bytes, dict[str, Any]] = {}
    for shard in run.scored_shards():
        if len(found) == len(wanted):
            break
        hashes = [row_hashes(sample)[1] for _, sample in read_shard(run.corpus / shard.name)]
        if wanted.isdisjoint(hashes):
            continue
        lines = pq.read_table(shard, columns=[*names, "detail"]).to_pylist()
        for text_hash, line in zip(hashes, lines, strict=True):
            if text_hash in wanted:
                found[text_hash] = line
    return found


def _as_weighted(columns: Mapping[str, Sequence[float]], signals: Sequence[str]) -> RowSignals:
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    kept = [*signals, *(name for name in ("nll", "length") if name not in signals)]
    values = {
        name: signal_values(name, arrays[column_of(name)])
        for name in kept
        if column_of(name) in arrays
    }
    return RowSignals(values, arrays["num_answer_tokens"].astype(np.int64))


def _rejected(row: RatedRow, detail: str) -> DataError:
    return DataError(f"{row.sample.source}: the selector has no score for this row: {detail}")
