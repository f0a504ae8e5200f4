"""What a step trains on depends on the seed and its number, not on who computes it."""

import pytest
import torch
from transformers import AutoTokenizer

from selectmoe.data.chat import ChatTokenizer
from selectmoe.data.readers import read_corpus
from selectmoe.errors import DataError
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.records import Message, Sample
from selectmoe.warmup.step_batches import StepBatches, StepSettings, TrainingRows


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR), max_sequence_length=256)


@pytest.fixture(scope="module")
def rows(chat):
    found = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)][:30]
    return TrainingRows(found, chat.tokenize(found))


def batches(rows, chat, **settings):
    defaults = {
        "effective_batch_size": 7, "max_tokens_per_batch": 1_024, "full_sequence_prediction": False,
        "kinds": ("shuffled_words", "other_answer"), "seed": 5,
    }  # fmt: skip
    return StepBatches(rows, chat, StepSettings(**{**defaults, **settings}))


def content(step) -> list[tuple[str, list[int]]]:
    """Every real row's id beside its copy's tokens, in an order that no grouping changes."""
    found = []
    for batch in step:
        for index, sample_id in enumerate(batch.sample_ids):
            row = index + batch.num_real
            if row < len(batch.token_ids_BT):
                kept = batch.attention_mask_BT[row]
                found.append((sample_id, batch.token_ids_BT[row][kept].tolist()))
            else:
                found.append((sample_id, []))
    return sorted(found)


@pytest.mark.parametrize("num_workers", [2, 3, 7])
def test_the_shares_of_all_workers_are_the_step_of_one(rows, chat, num_workers):
    for number in (0, 1, 6):  # the last is in a later pass over the rows
        whole = content(batches(rows, chat).step(number))
        shares = [
            batches(rows, chat, rank=rank, num_workers=num_workers).step(number)
            for rank in range(num_workers)
        ]
        assert sorted(row for share in shares for row in content(share)) == whole
        sizes = [len(content(share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_shares_and_labels_of_a_step_add_up_over_workers(rows, chat):
    shares = [batches(rows, chat, rank=rank, num_workers=3).step(2) for rank in range(3)]
    all_batches = [batch for share in shares for batch in share]
    assert sum(batch.share_of_step for batch in all_batches) == pytest.approx(1)
    num_labels = sum(int((batch.labels_BT[:, 1:] != -100).sum()) for batch in all_batches)
    assert {batch.num_labels_of_step for batch in all_batches} == {num_labels}


def test_a_stream_that_starts_later_goes_on_where_the_first_would(rows, chat):
    stream = iter(batches(rows, chat))
    skipped = [content(next(stream)) for _ in range(5)]
    resumed = iter(batches(rows, chat, first_step=3))
    assert [content(next(resumed)) for _ in range(2)] == skipped[3:]
    assert skipped[3] != skipped[0]


def test_every_row_comes_once_in_each_pass(rows, chat):
    steps = batches(rows, chat, kinds=(), effective_batch_size=10)
    ids = sorted(row.sample_id for row in rows.samples)
    for first in (0, 3):
        one_pass = [content(steps.step(first + n)) for n in range(3)]
        assert sorted(row[0] for step in one_pass for row in step) == ids


def test_another_seed_gives_other_rows(rows, chat):
    assert content(batches(rows, chat).step(0)) != content(batches(rows, chat, seed=6).step(0))


def test_no_batch_is_over_the_budget_unless_one_pair_alone_is(rows, chat):
    for batch in batches(rows, chat, max_tokens_per_batch=400, effective_batch_size=20).step(0):
        assert batch.token_ids_BT.numel() <= 400 or batch.num_real == 1
    assert len(batches(rows, chat, max_tokens_per_batch=1, effective_batch_size=20).step(0)) == 20


def test_a_batch_size_splits_a_step_and_loses_none_of_its_rows(rows, chat):
    step = batches(rows, chat, max_tokens_per_batch=10**6, batch_size=3).step(0)
    assert [batch.num_real for batch in step] == [3, 3, 1]
    [whole] = batches(rows, chat, max_tokens_per_batch=10**6).step(0)
    assert [name for batch in step for name in batch.sample_ids] == list(whole.sample_ids)
    assert sum(batch.share_of_step for batch in step) == pytest.approx(1)


def test_only_the_answers_of_real_rows_are_predicted(rows, chat):
    for full, mask_name in ((False, "answer_mask_BT"), (True, "attention_mask_BT")):
        for batch in batches(rows, chat, full_sequence_prediction=full).step(1):
            predicted = batch.labels_BT != -100
            assert not predicted[batch.num_real :].any()
            real = slice(batch.num_real)
            assert torch.equal(predicted[real], getattr(batch, mask_name)[real])
            assert torch.equal(batch.labels_BT[predicted], batch.token_ids_BT[predicted])


def test_a_worker_without_a_row_computes_one_that_counts_nothing(rows, chat):
    settings = {"effective_batch_size": 2, "num_workers": 3}
    [idle] = batches(rows, chat, rank=2, **settings).step(0)
    assert idle.share_of_step == 0
    assert idle.num_real == 1
    counted = [batches(rows, chat, rank=rank, **settings).step(0) for rank in range(2)]
    assert sum(b.share_of_step for step in counted for b in step) == pytest.approx(1)


def test_rows_that_cannot_be_made_worse_are_left_out_of_a_step(chat):
    samples = [
        Sample("d", f"short-{n}", (Message("user", "Say yes."), Message("assistant", "Yes.")))
        for n in range(3)
    ]
    text = "One two three four five six seven eight nine ten."
    samples.append(Sample("d", "long", (Message("user", "Count."), Message("assistant", text))))
    rows = TrainingRows(samples, chat.tokenize(samples))
    step = batches(rows, chat, effective_batch_size=4, kinds=("shuffled_words",)).step(0)
    assert [batch.sample_ids for batch in step] == [("long",)]
    assert step[0].share_of_step == 1
    short = TrainingRows(samples[:3], chat.tokenize(samples[:3]))
    with pytest.raises(DataError, match="none of 3 samples can be corrupted by shuffled_words"):
        batches(short, chat, effective_batch_size=3, kinds=("shuffled_words",)).step(0)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one sample, got none"):
        TrainingRows([], [])
