"""The end of a warm-up: its corpus is scored with the new gates, to give scores percentiles."""

import gc
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from selectmoe.config.warmup import WarmupConfig
from selectmoe.model.checkpoint import calibration_folder, weights_file
from selectmoe.paths import model_or_embedded
from selectmoe.records import Message, Sample, ScoredSample
from selectmoe.scoring.calibration import Calibration, calibrate, save_calibration
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.warmup.cache import ROWS_NAME, ROWS_PER_BLOCK

# Of 4,000 rows the share above a threshold that keeps 5 % is known to 0.34 percentage points.
MAX_CALIBRATION_ROWS = 4_000

logger = logging.getLogger(__name__)


def calibrate_warmup(
    config: WarmupConfig, *, rows: Path, weights: str, uses_gpu: bool
) -> Calibration:
    """Scores rows of the corpus as stage 2 will, and writes `calibration.json` beside the weights.

    rows: the folder that `prepare_warmup_rows` wrote. weights: what the warm-up wrote; it is loaded
    anew, so the model that was trained must be gone where memory holds one alone.
    """
    gc.collect()  # models and trainers refer to each other in circles
    if uses_gpu:
        torch.cuda.empty_cache()
    model = model_or_embedded(config.model)
    engine = ScoringEngine.from_pretrained(
        model,
        model_checkpoint_path=weights,
        device="cuda" if uses_gpu else "cpu",
        max_sequence_length=config.dataset.max_sequence_length,
    )
    calibration = calibrate_on(engine, sampled_rows(rows, seed=config.seed))
    save_calibration(calibration_folder(model, weights_file(weights)), calibration)
    return calibration


def calibrate_on(engine: ScoringEngine, samples: Sequence[Sample]) -> Calibration:
    """By the scores of these samples; those without a score are left out."""
    scores: list[float] = []
    corpus: Counter[str] = Counter()
    for start in range(0, len(samples), ROWS_PER_BLOCK):
        block = samples[start : start + ROWS_PER_BLOCK]
        for sample, outcome in zip(block, engine.score(block), strict=True):
            if isinstance(outcome, ScoredSample):
                scores.append(outcome.score)
                corpus[sample.dataset] += 1
        logger.info("calibrating: %s of %s rows", f"{start + len(block):,}", f"{len(samples):,}")
    return calibrate(
        scores,
        formula=engine.config.formula,
        max_sequence_length=engine.tokenizer.max_sequence_length,
        weights_hash=engine.weights_hash(),
        corpus=dict(sorted(corpus.items())),
    )


def sampled_positions(num_rows: int, *, seed: int) -> np.ndarray:
    """At most MAX_CALIBRATION_ROWS of the rows, in their order: int64 (N,)."""
    chosen = np.random.default_rng(seed).permutation(num_rows)[:MAX_CALIBRATION_ROWS]
    return np.sort(chosen)


def sampled_rows(folder: Path, *, seed: int) -> list[Sample]:
    """Of the rows that a warm-up learns from; the others are not held in memory."""
    file = pq.ParquetFile(folder / ROWS_NAME)
    positions = sampled_positions(file.metadata.num_rows, seed=seed)
    found: list[Sample] = []
    start = 0
    columns = ["dataset", "id", "messages", "source"]
    for batch in file.iter_batches(ROWS_PER_BLOCK, columns=columns):
        end = start + batch.num_rows
        inside = positions[(positions >= start) & (positions < end)]
        for row in batch.take(inside - start).to_pylist():
            messages = tuple(Message(**message) for message in row["messages"])
            found.append(Sample(row["dataset"], row["id"], messages, row["source"]))
        start = end
    return found
