"""Calibrates trained gates: scores a sample of the warm-up's corpus, for the length adjustment of
scores and their percentiles."""

import gc
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from selectmoe.config.calibrate import CalibrateConfig
from selectmoe.config.warmup import WarmupConfig
from selectmoe.corpus.shards import read_rows
from selectmoe.errors import DataError
from selectmoe.model.selector_files import find_selector
from selectmoe.paths import model_or_embedded
from selectmoe.records import Sample, ScoredSample
from selectmoe.scoring.calibration import Calibration, calibrate, save_calibration
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.scoring.formulas import num_averaged_tokens, sample_margins
from selectmoe.training.tokenized_rows import ROWS_PER_BLOCK, rows_file
from selectmoe.training.worker import TrainingWorker

# With 8,000 rows, the share above a threshold that keeps 5 % has a standard error of 0.24 points.
MAX_CALIBRATION_ROWS = CalibrateConfig().num_rows

logger = logging.getLogger(__name__)


def calibrate_warmup(config: WarmupConfig, worker: TrainingWorker, *, weights: str) -> Calibration:
    """Scores rows of the corpus as stage 2 will, and writes `calibration.json` beside the weights.

    weights: what the warm-up wrote. They are loaded into a new model, so the trained one must be
    gone where memory holds only one.
    """
    gc.collect()  # models and trainers hold references to each other
    if worker.uses_gpu:
        torch.cuda.empty_cache()
    model = model_or_embedded(config.model, config.revision)
    engine = ScoringEngine.from_pretrained(
        model,
        model_checkpoint_path=weights,
        device=worker.device,
        max_sequence_length=config.dataset.max_sequence_length,
        calibration=None,
    )
    calibration = calibrate_on(engine, sampled_rows(worker.output, seed=config.seed))
    save_calibration(find_selector(model, weights).calibration_folder(), calibration)
    return calibration


def calibrate_on(engine: ScoringEngine, samples: Sequence[Sample]) -> Calibration:
    """The calibration of the scores of these samples, without those that have no score.

    engine: of raw scores or adjusted ones; its layer scores are the same.
    """
    margins: list[np.ndarray] = []
    num_tokens: list[int] = []
    corpus: Counter[str] = Counter()
    for start in range(0, len(samples), ROWS_PER_BLOCK):
        block = samples[start : start + ROWS_PER_BLOCK]
        for sample, outcome in zip(block, engine.score(block), strict=True):
            if isinstance(outcome, ScoredSample):
                margins.append(sample_margins(outcome.layer_scores[None], engine.formula))
                num_tokens.append(
                    num_averaged_tokens(
                        outcome.num_answer_tokens, outcome.num_tokens, engine.formula
                    )
                )
                corpus[sample.dataset] += 1
        logger.info("calibrating: %s of %s rows", f"{start + len(block):,}", f"{len(samples):,}")
    if not margins:
        raise DataError("a calibration needs rows that have a score, got none")
    return calibrate(
        np.concatenate(margins),
        num_tokens,
        config=engine.config,
        max_sequence_length=engine.tokenizer.max_sequence_length,
        weights_hash=engine.weights_hash(),
        corpus=dict(sorted(corpus.items())),
    )


def sampled_positions(num_rows: int, *, seed: int) -> np.ndarray:
    """Positions of at most MAX_CALIBRATION_ROWS rows, ascending: int64 (N,)."""
    chosen = np.random.default_rng(seed).permutation(num_rows)[:MAX_CALIBRATION_ROWS]
    return np.sort(chosen)


def sampled_rows(run: Path, *, seed: int) -> list[Sample]:
    """A sample of the rows that a warm-up learned from; the others are not held in memory."""
    file = rows_file(run)
    positions = sampled_positions(pq.read_metadata(file).num_rows, seed=seed)
    return list(read_rows(file, positions))
