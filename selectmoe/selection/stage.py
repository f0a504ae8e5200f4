"""Stage 2 from a corpus to selected_data.jsonl: normalize, score shard by shard, keep the best.

Where the work is done is not decided here: a Runner maps functions over items and scores shards, in
this process or on a cluster, and a Backend says which model scores.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from selectmoe.config.code_version import code_version
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.map_items import MapItems
from selectmoe.corpus.normalize import rows_read, write_corpus
from selectmoe.corpus.shards import CorpusSummary, read_summary
from selectmoe.data.named_corpora import corpus_specs
from selectmoe.data.rejected import require_few_rejected
from selectmoe.data.rows import MAX_NAME_CHARACTERS
from selectmoe.data.writers import write_json
from selectmoe.errors import ResumeError, ScoringError
from selectmoe.paths import DEMO_CORPUS
from selectmoe.scoring.calibration import Calibration, load_calibration, save_calibration
from selectmoe.selection.backends import Backend
from selectmoe.selection.manifest import ScoringReport, write_manifest
from selectmoe.selection.outputs import select_rows, write_rejected_rows
from selectmoe.selection.run_folder import RunFolder
from selectmoe.selection.scored_shards import ShardCounts, devices_and_dtypes
from selectmoe.selection.signal_columns import count_missing

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Where the work of a run is done."""

    def start(self) -> None:
        """Called before anything else, once."""
        ...

    def require_workers(self, backend: Backend) -> None:
        """Raises SelectMoeError where nothing could score: called before the corpus is read."""
        ...

    def map_parts(self, look: Callable[[], None]) -> MapItems:
        """For the parts of a corpus; `look` is called now and then meanwhile."""
        ...

    def map_over_scores(self, folder: RunFolder) -> MapItems:
        """For passes over the scores in `folder`."""
        ...

    def score(
        self, backend: Backend, shards: Sequence[Path], scored: Path
    ) -> Iterable[ShardCounts]:
        """Writes the scores of each shard into the folder `scored`, in any order."""
        ...


class Progress(Protocol):
    """Who is told how far a run is."""

    def rows_read(self, num_rows: int) -> None: ...
    def scoring_started(self, *, num_rows: int, num_rows_done: int) -> None: ...
    def shard_scored(self, num_rows: int, num_tokens: int) -> None: ...
    def close(self) -> None:
        """Called after each of the two steps, also where it fails."""
        ...


class NoProgress:
    """Tells nobody."""

    def rows_read(self, num_rows: int) -> None: ...
    def scoring_started(self, *, num_rows: int, num_rows_done: int) -> None: ...
    def shard_scored(self, num_rows: int, num_tokens: int) -> None: ...
    def close(self) -> None: ...


def run_selection(
    config: SelectConfig,
    output: Path,
    *,
    backend: Backend | None,
    runner: Runner,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores what has no scores yet, selects, and writes every file of `output`.

    backend: None where `config.scored` names a finished run, whose scores are used as they are.
    Returns the manifest. Raises SelectMoeError for what the user can mend.
    """
    started = time.perf_counter()
    code_version()  # the manifest names the code that starts, whatever the checkout becomes
    if backend is None:
        folder = RunFolder(Path(str(config.scored)))
        scoring = folder.read_manifest()["scoring"]
    else:
        folder = RunFolder(output)
        report = score_corpus(config, folder, backend, runner, progress or NoProgress())
        scoring = asdict(report)
    selected = select_rows(
        folder,
        RunFolder(output),
        config,
        map_items=runner.map_over_scores(folder),
    )
    seconds = time.perf_counter() - started
    return write_manifest(config, RunFolder(output), selected, scoring, wall_seconds=seconds)


def score_corpus(
    config: SelectConfig, folder: RunFolder, backend: Backend, runner: Runner, progress: Progress
) -> ScoringReport:
    """Scores what of the corpus has no scores yet; each file in `folder` is whole or absent."""
    calibration = record_model(folder, backend)
    backend = backend.with_calibration(calibration)
    runner.start()
    summary = read_summary(folder.corpus)
    if summary is None or folder.unscored_shards():
        runner.require_workers(backend)
    summary = summary or normalize(config, folder, runner, progress)
    if summary.num_rejected > config.max_rejected * summary.num_read:
        write_rejected_rows(folder, folder)
    require_few_rejected(
        num_rejected=summary.num_rejected,
        num_read=summary.num_read,
        max_rejected=config.max_rejected,
        run=folder.root,
        first=summary.first_rejected,
    )
    shards = folder.unscored_shards()
    num_reused = summary.num_shards - len(shards)
    if num_reused:
        logger.info("%d of %d shards have scores already", num_reused, summary.num_shards)
    num_rows = summary.num_rows
    # By the mean size of a shard: the last one of a range is not full.
    num_rows_done = num_rows * num_reused // max(summary.num_shards, 1)
    progress.scoring_started(num_rows=num_rows, num_rows_done=num_rows_done)
    started = time.perf_counter()
    num_tokens = score_shards(folder, shards, backend, runner, progress) if shards else 0
    seconds = time.perf_counter() - started
    device, dtype = devices_and_dtypes(folder.scored)
    signals = count_signals(config.scoring.signals, folder)
    return ScoringReport(
        model=backend.model,
        weights_sha256=backend.weights_sha256,
        length="adjusted" if calibration is not None and calibration.length else "raw",
        num_shards=summary.num_shards,
        num_shards_reused=num_reused,
        num_duplicate_ids=summary.num_duplicate_ids,
        num_unusable_names=summary.num_unusable_names,
        device=device,
        dtype=dtype,
        signals=signals,
        num_tokens=num_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(num_tokens / seconds, 1),
    )


def count_signals(signals: Sequence[str], folder: RunFolder) -> dict[str, int]:
    """Of each signal, the scored rows without a value; a warning names those that lack one."""
    missing = count_missing(folder.scored_shards(), signals)
    for name, num_rows in missing.items():
        if num_rows:
            logger.warning(
                "%s is null for %s scored rows: it has no finite value, or no prompt (pmi)",
                name,
                f"{num_rows:,}",
            )
    return missing


def record_model(folder: RunFolder, backend: Backend) -> Calibration | None:
    """Writes down with which weights a new run scores, and copies their calibration; returns that
    of the run.

    A resumed run must give the bytes of one that was never interrupted, so the copy stays even if
    the one beside the weights is made anew. Raises ResumeError where the weights have changed.
    """
    ours = backend.weights_sha256
    if folder.model.is_file():
        before = json.loads(folder.model.read_text("utf-8"))["weights_sha256"]
        if before != ours:
            raise ResumeError(
                f"{folder.root}: this run was started with other weights: their SHA-256 was "
                f"{before[:12]}… and is {ours[:12]}… now; start a new run"
            )
        return load_calibration(folder.root)
    calibration = backend.calibration()
    if calibration is not None:
        save_calibration(folder.root, calibration)
    write_json(folder.model, {"weights_sha256": ours})
    return calibration


def normalize(
    config: SelectConfig, folder: RunFolder, runner: Runner, progress: Progress
) -> CorpusSummary:
    """Writes the shards of the corpus; of the demo corpus where none is named."""
    started = time.perf_counter()
    try:
        summary = write_corpus(
            corpus_specs(config.dataset) or (str(DEMO_CORPUS),),
            folder.corpus,
            rows_per_shard=config.rows_per_shard,
            subset_ratio=config.dataset.subset_ratio,
            duplicates=config.selection.duplicates,
            rules=config.dataset.column_rules,
            map_items=runner.map_parts(lambda: progress.rows_read(rows_read(folder.corpus))),
        )
    finally:
        progress.close()
    logger.info(
        "corpus: %s rows in %d shards, %d rejected, %d exact duplicates %s, %d duplicate ids "
        "(%.1f s)",
        f"{summary.num_read:,}",
        summary.num_shards,
        summary.num_rejected,
        summary.num_duplicates,
        "kept" if config.selection.duplicates == "keep" else "left out",
        summary.num_duplicate_ids,
        time.perf_counter() - started,
    )
    if summary.num_unusable_names:
        logger.info(
            "rows named as if they had no dataset or id, which is a list, an object or over %s "
            "characters: %s",
            f"{MAX_NAME_CHARACTERS:,}",
            f"{summary.num_unusable_names:,}",
        )
    return summary


def score_shards(
    folder: RunFolder,
    shards: Sequence[Path],
    backend: Backend,
    runner: Runner,
    progress: Progress,
) -> int:
    """Returns the number of tokens that the model read."""
    num_tokens = 0
    try:
        for counts in runner.score(backend, shards, folder.scored):
            num_tokens += counts.num_tokens
            progress.shard_scored(counts.num_rows, counts.num_tokens)
    finally:
        progress.close()
    if left := folder.unscored_shards():
        raise ScoringError(
            f"{folder.scored}: {len(left)} scored shards are not visible from the driver; the "
            "output folder must be on storage that all nodes share"
        )
    return num_tokens
