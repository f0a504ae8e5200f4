"""Which rows a finetuning reads: the selected ones, all, or as many at random."""

import json

import pytest

from selectmoe.config.finetune import FinetuneDatasetConfig
from selectmoe.corpus.normalize import write_shards
from selectmoe.data.readers import read_corpus
from selectmoe.errors import ConfigError, DataError
from selectmoe.finetune.sources import choose_rows
from tests.tiny_target import conversation, write_rows

NUM_ROWS, NUM_SELECTED = 60, 13


def ids(dataset, *, seed=0):
    return [row.sample_id for row in choose_rows(dataset, seed=seed).read()]


@pytest.fixture
def corpus(tmp_path):
    return write_rows(tmp_path / "corpus.jsonl", [conversation(n) for n in range(NUM_ROWS)])


@pytest.fixture
def run(tmp_path, corpus):
    """What stage 2 leaves that matters here."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_shards(read_corpus(str(corpus)), folder / "corpus", rows_per_shard=7)
    write_rows(folder / "selected_data.jsonl", [conversation(4 * n) for n in range(NUM_SELECTED)])
    (folder / "manifest.json").write_text("{}")
    return folder


def test_the_selected_rows_are_those_of_the_file_given_itself_or_by_its_run(run):
    expected = [f"row-{4 * n}" for n in range(NUM_SELECTED)]
    for path in (run, run / "selected_data.jsonl"):
        assert ids(FinetuneDatasetConfig(data_path=str(path))) == expected


def test_full_is_the_whole_corpus_that_was_selected_from(run):
    full = ids(FinetuneDatasetConfig(data_path=str(run), mode="full"))
    assert sorted(full) == sorted(f"row-{n}" for n in range(NUM_ROWS))


def test_random_draws_as_many_rows_as_were_selected_by_the_seed_alone(run):
    dataset = FinetuneDatasetConfig(data_path=str(run / "selected_data.jsonl"), mode="random")
    drawn = ids(dataset)
    assert len(set(drawn)) == NUM_SELECTED
    assert set(drawn) <= {f"row-{n}" for n in range(NUM_ROWS)}
    assert ids(dataset) == drawn
    assert set(ids(dataset, seed=1)) != set(drawn)


def test_a_fraction_of_a_corpus_is_the_same_rows_however_it_is_split(corpus, tmp_path):
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in range(3):
        (parts / f"{part}.jsonl").write_text("".join(lines[part::3]), "utf-8")
    drawn = [
        ids(FinetuneDatasetConfig(data_path=str(path), mode="random", fraction=0.29), seed=3)
        for path in (corpus, parts)
    ]
    assert len(drawn[0]) == 17  # floor(0.29 * 60)
    assert sorted(drawn[0]) == sorted(drawn[1])


def test_of_equal_rows_a_draw_takes_exactly_as_many_as_it_should(tmp_path):
    file = write_rows(tmp_path / "same.jsonl", [conversation(1)] * 10)
    dataset = FinetuneDatasetConfig(data_path=str(file), mode="random", fraction=0.5)
    assert ids(dataset) == ["row-1"] * 5


def test_a_run_that_cut_anothers_scores_again_draws_from_that_ones_corpus(run, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps({"scored": str(run)}))
    (again / "manifest.json").write_text("{}")
    write_rows(again / "selected_data.jsonl", [conversation(1), conversation(2)])
    drawn = ids(FinetuneDatasetConfig(data_path=str(again), mode="random"))
    assert len(drawn) == 2
    (again / "config.json").unlink()
    with pytest.raises(DataError, match="the corpus of this selection no longer exists"):
        ids(FinetuneDatasetConfig(data_path=str(again), mode="random"))


def test_an_empty_selection_is_refused(run):
    (run / "selected_data.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the selection is empty"):
        ids(FinetuneDatasetConfig(data_path=str(run)))


def test_a_selection_that_has_not_finished_is_not_taken_for_a_corpus(run):
    (run / "selected_data.jsonl").unlink()
    (run / "scored").mkdir()
    with pytest.raises(DataError, match=r"has not finished.*--resume"):
        ids(FinetuneDatasetConfig(data_path=str(run)))


def test_a_random_choice_from_a_bare_corpus_needs_a_size(corpus):
    with pytest.raises(ConfigError, match=r"dataset\.fraction must be set"):
        ids(FinetuneDatasetConfig(data_path=str(corpus), mode="random"))


def test_more_rows_than_there_are_cannot_be_drawn(run):
    rows = [conversation(n) for n in range(NUM_ROWS + 1)]
    write_rows(run / "selected_data.jsonl", rows)
    with pytest.raises(DataError, match="cannot draw 61 rows at random: the corpus has 60"):
        ids(FinetuneDatasetConfig(data_path=str(run), mode="random"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        ids(FinetuneDatasetConfig(data_path=str(tmp_path / "selected_data.jsonl")))


def test_a_corpus_with_other_names_of_columns_is_read_by_these(tmp_path):
    rows = [{"q": "Why?", "a": "Because.", "id": "1"}]
    corpus = write_rows(tmp_path / "table.jsonl", rows)
    names = {"prompt": "q", "response": "a"}
    dataset = FinetuneDatasetConfig(data_path=str(corpus), columns=names)
    [row] = choose_rows(dataset, seed=0).read()
    assert [message.content for message in row.messages] == ["Why?", "Because."]
