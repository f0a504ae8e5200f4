"""Every row is learned from or rejected with a reason; names become files."""

import json

import pytest
from transformers import AutoTokenizer

from selectmoe.config.warmup import WarmupDatasetConfig
from selectmoe.data.chat import ChatTokenizer
from selectmoe.errors import DataError, TooManyRejectedError
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.warmup.rows import read_warmup_rows
from selectmoe.warmup.settings import corpus_specs


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_SELECTOR)


def row(sample_id: str, question: str, answer: str | None) -> dict:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"dataset": "d", "id": sample_id, "messages": messages}


def read(file, tokenizer, *, length: int = 64, max_rejected: float = 1.0, full: bool = False):
    chat = ChatTokenizer(tokenizer, max_sequence_length=length)
    return read_warmup_rows(
        [str(file)],
        chat,
        subset_ratio=1.0,
        max_rejected=max_rejected,
        full_sequence_prediction=full,
    )


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


def test_rows_learned_from_and_rejected_add_up_to_those_read(corpus, tokenizer):
    found = read(corpus, tokenizer)
    assert [sample.sample_id for sample in found.rows.samples] == ["fine"]
    reasons = {rejected.sample_id: (rejected.reason, rejected.row) for rejected in found.rejected}
    assert reasons["asks too long"] == ("no_label", 2)
    assert len(found.rejected) == 2
    assert found.num_read == 3


def test_a_question_is_enough_where_the_whole_sequence_is_predicted(corpus, tokenizer):
    found = read(corpus, tokenizer, full=True)
    assert [s.sample_id for s in found.rows.samples] == ["fine", "asks too long"]


def test_too_many_rejected_rows_are_an_error_that_names_the_first(corpus, tokenizer):
    with pytest.raises(
        TooManyRejectedError, match=r"2 of 3 rows cannot be learned from, .*\.jsonl"
    ):
        read(corpus, tokenizer, max_rejected=0.5)


def test_data_with_no_assistant_turn_is_an_error(tmp_path, tokenizer):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row("a", "Hello?", None)) + "\n")
    with pytest.raises(
        TooManyRejectedError, match=r"1 of 1 rows cannot be learned from.*assistant"
    ):
        read(file, tokenizer, max_rejected=0.01)
    with pytest.raises(DataError, match="at least one sample, got none"):
        read(file, tokenizer)


def test_without_a_corpus_the_clean_rows_of_the_demo_are_read(tokenizer):
    chat = ChatTokenizer(tokenizer, max_sequence_length=512)
    found = read_warmup_rows(
        [], chat, subset_ratio=1.0, max_rejected=0.01, full_sequence_prediction=False
    )
    assert {sample.dataset for sample in found.rows.samples} == {"demo"}
    assert found.num_read == 380


def test_names_are_files_or_folders_below_the_folder(tmp_path):
    (tmp_path / "cot").mkdir()
    (tmp_path / "dolly.jsonl").touch()
    (tmp_path / "flan_v2.parquet").touch()
    dataset = WarmupDatasetConfig(
        paths=("/more.jsonl",), names=("cot", "dolly", "flan_v2"), folder=str(tmp_path)
    )
    assert corpus_specs(dataset) == (
        "/more.jsonl",
        str(tmp_path / "cot"),
        str(tmp_path / "dolly.jsonl"),
        str(tmp_path / "flan_v2.parquet"),
    )
    wrong = WarmupDatasetConfig(names=("oasst1",), folder=str(tmp_path))
    with pytest.raises(
        DataError, match=r"'oasst1' must be a folder or a .* which holds cot, dolly"
    ):
        corpus_specs(wrong)
