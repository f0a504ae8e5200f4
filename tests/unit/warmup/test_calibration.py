"""After a warm-up its corpus is scored, and every score of the new gates has a percentile."""

import numpy as np
import pytest

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.records import Message, Sample
from selectmoe.scoring.calibration import describe
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.training.worker import TrainingWorker
from selectmoe.warmup.calibration import (
    MAX_CALIBRATION_ROWS,
    calibrate_on,
    calibrate_warmup,
    sampled_positions,
    sampled_rows,
)
from selectmoe.warmup.rows import load_training_rows, prepare_warmup_rows, warmup_tokenizer
from tests.warmup_run import warm_up

SETTINGS = {
    "dataset.subset_ratio": 0.2, "dataset.max_sequence_length": 64, "max_rejected": 1.0,
    "training.num_steps": 2, "training.effective_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with the rows that a worker finds there."""
    folder = tmp_path_factory.mktemp("run")
    config = from_values(WarmupConfig, SETTINGS)
    prepare_warmup_rows(config, warmup_tokenizer(config), folder)
    return folder


# peft asks for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("peft_mode", ["full_rank", "lora"])
def test_the_trained_weights_score_with_percentiles(tmp_path, peft_mode):
    config = from_values(WarmupConfig, {**SETTINGS, "training.peft_mode": peft_mode})
    worker = TrainingWorker(output=tmp_path, scratch=tmp_path / "scratch")
    weights = warm_up(config, worker).weights
    written = calibrate_warmup(config, worker, weights=weights)
    samples = load_training_rows(tmp_path).samples
    assert describe(written)["corpus"] == {"demo": len(samples)}
    assert written.max_sequence_length == 64
    engine = ScoringEngine.from_pretrained(
        model_checkpoint_path=tmp_path, device="cpu", max_sequence_length=64
    )
    scores = [outcome.score for outcome in engine.score(samples)]
    found = np.sort(engine.calibration.percentiles(scores))
    middles = 100 * (np.arange(len(samples)) + 0.5) / len(samples)
    # Half a step of the table, and half a row where two rows swap: another batch, other rounding.
    np.testing.assert_allclose(found, middles, rtol=0, atol=0.1 + 50 / len(samples))
    plain = ScoringEngine.from_pretrained(device="cpu", max_sequence_length=64)
    assert plain.score(samples[:1])[0].score != pytest.approx(scores[0], abs=1e-6)


def test_all_rows_of_a_small_corpus_are_taken_and_8000_of_a_large_one(run):
    assert sampled_rows(run, seed=0) == list(load_training_rows(run).samples)
    positions = sampled_positions(10_000, seed=0)
    assert len(np.unique(positions)) == MAX_CALIBRATION_ROWS == len(positions)
    assert (np.diff(positions) > 0).all()
    assert positions.tolist() == sampled_positions(10_000, seed=0).tolist()
    assert positions.tolist() != sampled_positions(10_000, seed=1).tolist()


def test_a_row_without_a_score_is_left_out(run):
    engine = ScoringEngine.from_pretrained(device="cpu")
    engine.tokenizer.template = (
        "{% if messages | length == 1 %}{{ raise_exception('one turn') }}{% endif %}"
        + engine.tokenizer.template
    )
    lonely = Sample("demo", "lonely", (Message("assistant", "Hello there."),))
    found = calibrate_on(engine, [*sampled_rows(run, seed=0)[:2], lonely])
    assert (found.num_samples, found.corpus) == (2, {"demo": 2})
