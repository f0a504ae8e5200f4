"""Rows on disk are the rows that reading the corpus gives."""

import json

import numpy as np
import pytest

from selectmoe.config.loading import from_values
from selectmoe.config.warmup import WarmupConfig
from selectmoe.warmup.cache import (
    load_warmup_rows,
    prepare_warmup_rows,
    read_warmup_summary,
    warmup_tokenizer,
)
from selectmoe.warmup.stage import TrainingPlace, run_warmup, warmup_rows

SETTINGS = {
    "dataset.subset_ratio": 0.2, "dataset.max_sequence_length": 64, "max_rejected": 1.0,
    "training.num_steps": 2, "training.effective_batch_size": 2,
}  # fmt: skip


@pytest.fixture
def config():
    return from_values(WarmupConfig, SETTINGS)


def prepare(config, output, on_progress=lambda num_done, num_rows: None):
    return prepare_warmup_rows(config, output, output / "tokenized", on_progress=on_progress)


def test_rows_from_disk_are_those_of_the_corpus(config, tmp_path):
    shown = []
    summary = prepare(config, tmp_path, lambda *progress: shown.append(progress))
    found = load_warmup_rows(tmp_path / "tokenized")
    place = TrainingPlace(output=tmp_path / "other", scratch=tmp_path / "scratch")
    read = warmup_rows(config, warmup_tokenizer(config), place)
    assert found.rows.samples == list(read.rows.samples)
    for one, other in zip(found.rows.tokenized, read.rows.tokenized, strict=True):
        assert one.sample_id == other.sample_id
        assert one.truncated == other.truncated
        assert one.token_ids.dtype == other.token_ids.dtype
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.answer_mask, other.answer_mask)
    assert summary.num_read == summary.num_samples + summary.num_rejected
    assert summary.num_truncated == sum(row.truncated for row in read.rows.tokenized) > 0
    assert shown[-1] == (summary.num_read, summary.num_read)
    lines = (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["no_label"] * summary.num_rejected
    assert (tmp_path / "other" / "rejected.jsonl").read_text("utf-8").splitlines() == lines


def test_they_are_made_once_and_made_anew_for_other_settings(config, tmp_path):
    prepare(config, tmp_path)
    file = tmp_path / "tokenized" / "rows.parquet"
    made = file.stat().st_mtime_ns
    prepare(config, tmp_path)
    assert file.stat().st_mtime_ns == made
    prepare(from_values(WarmupConfig, {**SETTINGS, "dataset.max_sequence_length": 65}), tmp_path)
    assert file.stat().st_mtime_ns != made


def test_rows_that_are_not_whole_are_none(config, tmp_path):
    prepare(config, tmp_path)
    (tmp_path / "tokenized" / "summary.json").unlink()
    assert read_warmup_summary(tmp_path / "tokenized") is None


def test_a_warm_up_from_disk_counts_what_was_rejected(config, tmp_path):
    summary = prepare(config, tmp_path)
    place = TrainingPlace(
        output=tmp_path, scratch=tmp_path / "scratch", rows=tmp_path / "tokenized"
    )
    report = run_warmup(config, place)
    assert (report.num_samples, report.num_rejected) == (summary.num_samples, summary.num_rejected)
    assert report.num_rejected > 0
