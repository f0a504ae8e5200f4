"""Gates on a real language model: the shipped ones see faults, and a warm-up makes others."""

import json
from random import Random

import numpy as np
import pytest

from recipes.held_out_auroc import auroc, score_samples
from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.data.readers import read_corpus
from selectmoe.model.gates_config import read_gates_config
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.base_stage import run_base_warmup
from selectmoe.warmup.rows import prepare_warmup_rows, warmup_tokenizer
from selectmoe.warmup.step_batches import make_copy

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

SETTINGS = {
    "dataset.subset_ratio": 0.2, "dataset.max_sequence_length": 128, "max_rejected": 1.0,
    "training.num_copies": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(smollm2) -> ScoringEngine:
    """With the gates that ship with the package."""
    return ScoringEngine.from_pretrained(str(smollm2), device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return [row for row in rows if row.dataset == "demo"][:60]


def test_the_shipped_gates_rank_rows_above_corrupted_copies(engine, samples):
    kinds = ("gibberish", "shuffled_words", "typos", "run_on", "mojibake")
    random = Random(0)
    copies = [make_copy(row, samples, kinds=kinds, random=random) for row in samples]
    bad = score_samples(engine, [copy for copy in copies if copy is not None])
    # Their card has .96 over all kinds; of 60 rows the standard error is .03.
    assert auroc(score_samples(engine, samples), bad) > 0.85


def test_a_row_alone_has_the_score_that_it_has_in_a_batch(engine, samples):
    together = score_samples(engine, samples[:8])
    alone = [score_samples(engine, [sample])[0] for sample in samples[:8]]
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)  # float32, 18 layers


def test_the_shipped_gates_are_calibrated_for_this_folder(engine):
    assert engine.calibration is not None
    assert engine.calibration.length is not None


def test_gates_are_warmed_up_on_the_layers_that_count_and_score(smollm2, samples, tmp_path):
    config = from_values(WarmupConfig, {**SETTINGS, "model": str(smollm2)})
    prepare_warmup_rows(config, warmup_tokenizer(config), tmp_path)
    report = run_base_warmup(config, TrainingWorker(output=tmp_path, scratch=tmp_path))
    assert report.held_out_auroc > 0.65  # some 75 rows with a copy each
    assert report.fit_seconds < 120
    assert list(read_gates_config(tmp_path).layers) == report.layers
    assert len(json.loads((tmp_path / "layers.json").read_text("utf-8"))) == 55
    warmed = ScoringEngine.from_pretrained(
        str(smollm2), model_checkpoint_path=str(tmp_path), device="cpu"
    )
    assert np.isfinite(score_samples(warmed, samples[:4])).all()
    assert warmed.calibration is not None
