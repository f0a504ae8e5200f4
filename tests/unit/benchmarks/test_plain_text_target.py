"""A target model that was finetuned on plain text."""

import gzip

import pytest

from benchmarks.plain_text_target import plain_text_target, read_paragraphs
from benchmarks.quality_worth import WorthSettings, mean_loss, run_one
from selectmoe.data.readers import read_corpus
from selectmoe.errors import DataError
from selectmoe.paths import DEMO_CORPUS

WORDS = "the old sailor told a long story of rain and of ships that never came home again "


@pytest.fixture
def book(tmp_path):
    paragraphs = [f"{number} {WORDS * 6}" for number in range(12)]
    with gzip.open(tmp_path / "book.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n\n".join(["A headline", *paragraphs]))
    return tmp_path / "book.txt.gz"


def test_paragraphs_are_long_and_sampled_deterministically(book):
    found = read_paragraphs(book, num_paragraphs=5)
    assert len(set(found)) == 5
    assert all(WORDS in paragraph for paragraph in found)
    assert read_paragraphs(book, num_paragraphs=5) == found
    with pytest.raises(DataError, match="must have 13 paragraphs of more than 400 characters"):
        read_paragraphs(book, num_paragraphs=13)


def test_training_on_one_phrase_increases_the_loss_of_answers(book, tmp_path):
    paragraphs = read_paragraphs(book, num_paragraphs=12)
    target = plain_text_target(paragraphs, WorthSettings(max_sequence_length=128), tmp_path)
    held_out = [row for row in read_corpus(str(DEMO_CORPUS)) if row.dataset == "demo"][:10]
    before, after = (
        mean_loss(run_one([], 0, held_out, WorthSettings(model=model, max_sequence_length=512)))
        for model in (None, str(target))
    )
    # Two steps with a learning rate of 1e-2; rounding alone cannot change it by a hundredth.
    assert after > before + 0.01
