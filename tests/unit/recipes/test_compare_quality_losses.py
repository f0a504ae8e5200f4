"""The comparison of quality losses on the demo corpus: its metrics and its rows."""

import json

import numpy as np
import pytest

from recipes.baseline_scores import answer_nll, load_language_model
from recipes.compare_quality_losses import (
    LOSSES,
    load_engine,
    main,
    measure_loss,
    read_held_out,
)
from recipes.held_out_auroc import auroc
from selectmoe.config.warmup import TrainingConfig, WarmupConfig, WarmupDatasetConfig
from selectmoe.corpus.shards import row_key
from selectmoe.errors import DataError
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.warmup.rows import choose_warmup_rows


def config_of(*, subset_ratio: float = 0.5, **training) -> WarmupConfig:
    return WarmupConfig(
        dataset=WarmupDatasetConfig(subset_ratio=subset_ratio, max_sequence_length=128),
        training=TrainingConfig(effective_batch_size=2, quality_gate_init_std=0.02, **training),
        max_rejected=1.0,  # with so few tokens some rows are truncated before their answer
        seed=1,
    )


@pytest.fixture(scope="module")
def held_out():
    return read_held_out(config_of(), num_rows=8, unseen=False)


def test_two_losses_and_the_baselines_give_a_table_and_a_file(tmp_path, capsys):
    main([
        "--output", str(tmp_path), "--losses", "contrastive,linear", "--num-steps", "2",
        "--batch-size", "2", "--num-rows", "6", "--subset-ratio", "0.5", "--threads", "1",
        "--max-sequence-length", "128", "max_rejected=1",
    ])  # fmt: skip
    baselines = ["untrained, seed 1", "untrained, seed 2", "untrained, seed 3"]
    names = ["contrastive", "linear", *baselines, "answer length", "log-likelihood"]
    report = json.loads((tmp_path / "quality_losses.json").read_text("utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == names
    assert all(0 <= row["auroc_mean"] <= 1 for row in rows.values())
    # New gates are nearly open: sigmoid(4), 0.98, and two steps change them little.
    assert all(0.9 < rows[name]["good_real"] < 1 for name in [*baselines, "contrastive", "linear"])
    assert rows["answer length"]["good_real"] is None
    assert [rows[name]["num_steps"] for name in names[:3]] == [2, 2, None]
    assert rows["contrastive"]["good_real"] != rows["linear"]["good_real"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:9]] == [f"| {name}" for name in names]
    assert len(lines) == 9 + 3 + len(rows["contrastive"]["auroc"])


def test_all_six_losses_are_known():
    assert len(LOSSES) == 6
    assert "contrastive" in LOSSES


def test_evaluation_rows_are_not_training_rows(held_out):
    config = config_of()
    learned_from = {row_key(sample) for sample in choose_warmup_rows(config).read()}
    assert len(learned_from) > 100
    assert len(held_out.originals) == 8
    assert not learned_from & {row_key(sample) for sample in held_out.originals}


def test_mixed_copies_are_one_per_row_of_alternating_kinds(held_out):
    copies = held_out.mixed_copies()
    originals, kinds = zip(*(copy.sample_id.rsplit("#", 1) for copy in copies), strict=True)
    assert list(originals) == [sample.sample_id for sample in held_out.originals]
    assert len(set(kinds)) == 8


def test_a_subset_that_leaves_no_evaluation_rows_is_rejected():
    with pytest.raises(DataError, match="subset_ratio=1 must leave rows for evaluation"):
        read_held_out(config_of(subset_ratio=1.0), num_rows=8, unseen=False)


def test_a_warm_up_that_collapses_is_evaluated_as_it_stopped(held_out, tmp_path):
    # Closed from the start, and steps too small to open them.
    config = config_of(
        num_steps=6, logging_steps=1, learning_rate=1e-6, quality_loss_type="linear",
        quality_gate_init_bias=-20.0,
    )  # fmt: skip
    row = measure_loss("linear", config, held_out, tmp_path)
    assert row.note.startswith("stopped at step 3: the gates have collapsed: every layer")
    assert "try another" not in row.note  # the remedy is for whoever started the warm-up
    assert row.num_steps == 3
    assert row.good_real < 0.001  # where a warm-up calls it trash
    assert row.auroc


def test_the_likelihood_of_a_row_does_not_depend_on_the_order(held_out):
    model = load_language_model(EMBEDDED_SELECTOR, on_gpu=False)
    tokenizer = load_engine(config_of(), None).tokenizer
    nll = answer_nll(model, tokenizer, held_out.originals)
    assert (nll > 0).all()
    assert len(set(nll)) == len(nll)
    # Rows are padded with other rows: float32 sums of other shapes.
    reversed_nll = answer_nll(model, tokenizer, held_out.originals[::-1])
    np.testing.assert_allclose(reversed_nll[::-1], nll, rtol=0, atol=1e-4)


def test_auroc_counts_ties_as_half():
    good, bad = np.array([1.0, 3.0]), np.array([1.0, 2.0])
    # 1 = 1: half; 1 < 2: 0; 3 > 1 and 3 > 2: two. 2.5 of 4 pairs.
    assert auroc(good, bad) == 2.5 / 4
