"""Conversations become token ids and targets once; nothing disappears on the way."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from selectmoe.config.finetune import FinetuneConfig, FinetuneDatasetConfig
from selectmoe.config.loading import load_config
from selectmoe.data.chat import DEFAULT_CHAT_TEMPLATE
from selectmoe.data.rejected import rejected_file
from selectmoe.errors import DataError, ModelError, TooManyRejectedError
from selectmoe.finetune.supervised_data import (
    IGNORED_LABEL,
    StepOrder,
    SupervisedRows,
    load_target_tokenizer,
    prepare_supervised_rows,
    with_chat_template,
)
from selectmoe.training.tokenized_rows import read_summary
from tests.tiny_olmoe import ASSISTANT, END, USER, tiny_tokenizer
from tests.tiny_target import conversation, write_rows


def settings(file, *, length=256, **others):
    dataset = FinetuneDatasetConfig(data_path=str(file), max_sequence_length=length)
    return FinetuneConfig(dataset=dataset, **others)


def rejected(folder):
    return [json.loads(line) for line in rejected_file(folder).read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [conversation(n) for n in range(20)])


def test_targets_are_what_the_assistant_says_and_its_end_mark(file, tmp_path):
    tokenizer = tiny_tokenizer()
    summary = prepare_supervised_rows(settings(file), tokenizer, tmp_path)
    rows = SupervisedRows(tmp_path)
    assert (summary.num_read, summary.num_rows, len(rows)) == (20, 20, 20)
    batch = rows.batch([3, 11])
    for number, ids, labels in zip([3, 11], batch["input_ids"], batch["labels"], strict=True):
        messages = conversation(number)["messages"]
        assert tokenizer.decode(labels[labels != IGNORED_LABEL]) == messages[1]["content"] + END
        length = rows.lengths[number]
        whole = f"{USER}{messages[0]['content']}{ASSISTANT}{messages[1]['content']}{END}"
        assert tokenizer.decode(ids[:length]) == whole
        assert (labels[length:] == IGNORED_LABEL).all()
    assert rows.ids_of(batch["row_numbers"].tolist()) == ["row-3", "row-11"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_is_not_trained_on_is_no_target(tmp_path, mark):
    asked, answered = conversation(3)["messages"]
    doubt = answered | {"content": "5 5"} | mark
    thought = answered | {"reasoning_content": "7 7"}
    turns = [asked, doubt, asked, thought]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    tokenizer = tiny_tokenizer()
    prepare_supervised_rows(settings(file), tokenizer, tmp_path)
    batch = SupervisedRows(tmp_path).batch([0])
    [ids], [labels] = batch["input_ids"], batch["labels"]
    targets = tokenizer.decode(labels[labels != IGNORED_LABEL])
    assert targets.endswith(answered["content"] + END)
    assert "7 7" in targets
    assert "5 5" not in targets
    assert "5 5" in tokenizer.decode(ids)


def test_a_first_token_is_never_a_target(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "the gate is open"}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    prepare_supervised_rows(settings(file), tokenizer, tmp_path)
    labels = SupervisedRows(tmp_path).batch([0])["labels"][0]
    assert labels[0] == IGNORED_LABEL
    assert (labels[1:] != IGNORED_LABEL).all()


def test_long_rows_are_cut_and_counted_and_those_without_an_answer_rejected(tmp_path):
    rows = [conversation(n) for n in range(8)]
    rows[2]["messages"][0]["content"] = "the gate " * 60
    rows[5]["messages"][1]["content"] = "the gate " * 60
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": []}])
    folder = tmp_path / "run"
    summary = prepare_supervised_rows(
        settings(file, length=32, max_rejected=0.5), tiny_tokenizer(), folder
    )
    assert (summary.num_read, summary.num_rows, summary.num_truncated) == (9, 7, 1)
    assert summary.num_rejected == {"no_answer_token": 1, "messages_empty": 1}
    assert summary.max_tokens == 32
    by_reason = {row["reason"]: row for row in rejected(folder)}
    assert by_reason["no_answer_token"]["id"] == "row-2"
    assert by_reason["no_answer_token"]["file"] == str(file)
    assert by_reason["no_answer_token"]["row"] == 3
    assert "first 32 tokens" in by_reason["no_answer_token"]["detail"]
    batch = SupervisedRows(folder).batch(range(7))
    assert ((batch["labels"] != IGNORED_LABEL).sum(1) > 0).all()


def test_a_model_with_fewer_positions_cuts_earlier(file, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 20}')
    config = settings(file, max_rejected=1.0, model=str(tmp_path))
    assert prepare_supervised_rows(config, tiny_tokenizer(), folder).max_tokens == 20


def test_too_many_rejected_rows_stop_the_run_and_none_left_does_anyway(tmp_path):
    rows = [conversation(n) for n in range(9)] + [{"messages": [{"role": "user", "content": "?"}]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(TooManyRejectedError, match=r"1 of 10 rows.*max_rejected=0\.01.*:10: "):
        prepare_supervised_rows(settings(file), tiny_tokenizer(), tmp_path)
    assert read_summary(tmp_path) is None
    file = write_rows(tmp_path / "other.jsonl", rows[-1:])
    with pytest.raises(DataError, match=r"all 1 rows are rejected.*assistant turn"):
        prepare_supervised_rows(settings(file, max_rejected=1.0), tiny_tokenizer(), tmp_path)


def test_rows_are_tokenized_once_and_again_for_other_settings(file, tmp_path):
    folder = tmp_path / "run"
    summary = prepare_supervised_rows(settings(file), tiny_tokenizer(), folder)
    file.rename(tmp_path / "moved.jsonl")
    assert prepare_supervised_rows(settings(file), tiny_tokenizer(), folder) == summary
    with pytest.raises(DataError, match="no such file"):
        prepare_supervised_rows(settings(file, length=64), tiny_tokenizer(), folder)


def test_an_interrupted_tokenization_leaves_nothing_that_passes_for_whole(file, tmp_path):
    folder = tmp_path / "run"

    def interrupt(num_done, num_rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_supervised_rows(settings(file), tiny_tokenizer(), folder, on_progress=interrupt)
    assert list((folder / "tokenized").iterdir()) == []
    whole = prepare_supervised_rows(settings(file), tiny_tokenizer(), folder)
    other = prepare_supervised_rows(settings(file), tiny_tokenizer(), tmp_path / "other")
    assert whole == other


def test_progress_says_how_many_rows_are_done(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [conversation(n) for n in range(1_100)])
    told = []
    config = dataclasses.replace(
        settings(file),
        dataset=FinetuneDatasetConfig(data_path=str(file), mode="random", fraction=0.5),
    )
    prepare_supervised_rows(
        config, tiny_tokenizer(), tmp_path / "t", on_progress=lambda *n: told.append(n)
    )
    assert told == [(512, 550), (550, 550)]


def test_a_row_that_the_template_refuses_leaves_its_neighbours_alone(tmp_path):
    rows = [conversation(n) for n in range(3)]
    rows[1]["messages"].insert(0, {"role": "system", "content": "be short"})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    file = write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    summary = prepare_supervised_rows(settings(file, max_rejected=0.5), tokenizer, folder)
    assert summary.num_rejected == {"chat_template": 1}
    assert SupervisedRows(folder).ids_of([0, 1]) == ["row-0", "row-2"]
    assert "no system turn" in rejected(folder)[0]["detail"]


@pytest.mark.parametrize("begins_with", ["", END])
def test_our_template_keeps_a_first_token_of_the_tokenizers_own(file, tmp_path, begins_with):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if begins_with:  # as Llama's tokenizer, which puts its <s> before every text
        tokenizer.bos_token = END
        token = (END, tokenizer.convert_tokens_to_ids(END))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{END} $A", special_tokens=[token]
        )
    ours = FinetuneDatasetConfig(data_path=str(file), chat_template="selectmoe")
    config = FinetuneConfig(dataset=ours)
    prepare_supervised_rows(config, with_chat_template(tokenizer, config), tmp_path)
    row = SupervisedRows(tmp_path).row(0)
    assert tokenizer.decode(row.token_ids).startswith(f"{begins_with}{USER}\nsay 0")
    assert tokenizer.chat_template.endswith(DEFAULT_CHAT_TEMPLATE)


def test_a_model_without_a_template_is_refused_unless_ours_is_asked_for(tmp_path):
    base = str(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    own, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(base)
    cure = r"base: its tokenizer must have a chat template, .*dataset\.chat_template=selectmoe uses"
    with pytest.raises(ModelError, match=cure):
        load_target_tokenizer(FinetuneConfig(model=base))
    ours = FinetuneDatasetConfig(chat_template="selectmoe")
    given = load_target_tokenizer(FinetuneConfig(model=base, dataset=ours)).chat_template
    assert given == DEFAULT_CHAT_TEMPLATE
    tiny_tokenizer().save_pretrained(tmp_path / "chat")  # one with a template of its own
    for dataset, expected in ((FinetuneDatasetConfig(), own), (ours, DEFAULT_CHAT_TEMPLATE)):
        config = FinetuneConfig(model=str(tmp_path / "chat"), dataset=dataset)
        assert load_target_tokenizer(config).chat_template == expected


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "olmoe-1b-7b"])
def test_presets_of_base_models_without_a_template_ask_for_ours(name):
    assert load_config(FinetuneConfig, [f"preset={name}"]).dataset.chat_template == "selectmoe"


def test_a_tokenizer_that_is_not_there_or_unreadable_is_one_line(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    assert load_target_tokenizer(FinetuneConfig(model=str(tmp_path / "whole"))).chat_template
    broken = tmp_path / "broken"
    tiny_tokenizer().save_pretrained(broken)
    (broken / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for model, message in (
        (str(broken), "its tokenizer cannot be read"),
        (str(tmp_path / "empty"), "has no tokenizer"),
        (
            "nobody/has-this-model",
            "its tokenizer could not be downloaded",
        ),  # the tests have no network
    ):
        with pytest.raises(ModelError, match=message) as refused:
            load_target_tokenizer(FinetuneConfig(model=model))
        assert "\n" not in str(refused.value)


LENGTHS = np.arange(50) % 13 + 2


def order(*, epoch, seed=0):
    sampler = StepOrder(LENGTHS, rows_per_step=8, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    assert sorted(order(epoch=0)) == sorted(order(epoch=1)) == list(range(50))
    assert order(epoch=0) != order(epoch=1)
    assert order(epoch=1) == order(epoch=1)
    assert order(epoch=1) != order(epoch=1, seed=1)


def test_rows_are_by_length_within_a_step_and_by_chance_between_steps():
    rows = order(epoch=0)
    steps = [LENGTHS[rows[start : start + 8]] for start in range(0, 50, 8)]
    assert all((np.diff(step) <= 0).all() for step in steps)
    # Sorted over all rows the steps' means would fall from 14 to 2; by chance they stay near 8.
    means = [step.mean() for step in steps]
    assert max(means) - min(means) < 8
    assert means != sorted(means, reverse=True)
