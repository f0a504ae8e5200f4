"""What a warm-up learns from: every row is learned from or rejected; names become files."""

import json
from random import Random

import numpy as np
import pytest

from selectmoe.config.warmup import TrainingConfig, WarmupConfig, WarmupDatasetConfig
from selectmoe.data.rejected import rejected_file
from selectmoe.errors import TooManyRejectedError
from selectmoe.warmup.rows import load_training_rows, prepare_warmup_rows, warmup_tokenizer
from selectmoe.warmup.step_batches import make_copy


def row(sample_id: str, question: str, answer: str | None) -> dict:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"dataset": "d", "id": sample_id, "messages": messages}


def config_of(*paths, length: int = 64, max_rejected: float = 1.0, full: bool = False):
    dataset = WarmupDatasetConfig(
        paths=tuple(map(str, paths)), subset_ratio=1.0, max_sequence_length=length
    )
    training = TrainingConfig(full_sequence_prediction=full)
    return WarmupConfig(dataset=dataset, training=training, max_rejected=max_rejected)


def prepare(config, run):
    return prepare_warmup_rows(config, warmup_tokenizer(config), run)


@pytest.fixture
def corpus(tmp_path):
    rows = [
        row("fine", "Two and two?", "Four."),
        row("asks too long", "word " * 200, "Yes."),
        row("no answer", "Hello?", None),
    ]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_rows_learned_from_and_rejected_add_up_to_those_read(corpus, tmp_path):
    summary = prepare(config_of(corpus), tmp_path)
    assert (summary.num_read, summary.num_rows) == (3, 1)
    assert [s.sample_id for s in load_training_rows(tmp_path).samples] == ["fine"]
    lines = map(json.loads, rejected_file(tmp_path).read_text("utf-8").splitlines())
    rejected = {line["id"]: (line["reason"], line["row"]) for line in lines}
    assert rejected["asks too long"] == ("no_answer_token", 2)
    assert len(rejected) == 2


def test_an_answer_that_is_not_trained_on_is_neither_a_target_nor_corrupted(tmp_path):
    turns = row("a", "Two and two?", "Four of them, as always.")["messages"]
    doubt = turns[1] | {"content": "Five of them, as ever.", "weight": 0}
    file = tmp_path / "corpus.jsonl"
    file.write_text(json.dumps({"id": "a", "messages": [turns[0], doubt, *turns]}) + "\n")
    prepare(config_of(file), tmp_path)
    rows = load_training_rows(tmp_path)
    [sample], [tokens] = rows.samples, rows.tokenized
    read = warmup_tokenizer(config_of(file)).tokenizer.decode(tokens.token_ids[tokens.answer_mask])
    assert "Four" in read
    assert "Five" not in read
    copy = make_copy(sample, [sample], kinds=("shuffled_words",), random=Random(0))
    assert copy.messages[1] == sample.messages[1]
    assert copy.messages[3] != sample.messages[3]


def test_a_question_is_enough_where_the_whole_sequence_is_predicted(corpus, tmp_path):
    prepare(config_of(corpus, full=True), tmp_path)
    ids = [sample.sample_id for sample in load_training_rows(tmp_path).samples]
    assert ids == ["fine", "asks too long"]


def test_data_with_no_assistant_turn_is_an_error(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row("a", "Hello?", None)) + "\n")
    with pytest.raises(TooManyRejectedError, match=r"all 1 rows are rejected.*assistant"):
        prepare(config_of(file), tmp_path)


def test_the_rows_on_disk_are_the_subset_of_the_clean_demo_rows(tmp_path):
    config = WarmupConfig(
        dataset=WarmupDatasetConfig(subset_ratio=0.2, max_sequence_length=64), max_rejected=1.0
    )
    summary = prepare(config, tmp_path)
    rows = load_training_rows(tmp_path)
    assert {sample.dataset for sample in rows.samples} == {"demo"}
    assert 0 < summary.num_rows == len(rows.samples) < 380 * 0.3
    assert summary.num_truncated > 0
    expected = warmup_tokenizer(config).tokenize(rows.samples)
    for one, other in zip(rows.tokenized, expected, strict=True):
        assert (one.sample_id, one.token_ids.dtype) == (other.sample_id, other.token_ids.dtype)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.answer_mask, other.answer_mask)


def test_of_the_demo_corpus_the_clean_rows_are_read(tmp_path):
    summary = prepare(config_of(length=512), tmp_path)
    assert summary.num_read == 380
