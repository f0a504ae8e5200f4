"""Control samples of finished selections: matched to them, or the longest answers."""

import json
from collections import Counter

import numpy as np
import pytest

from selectmoe.config.finetune import FinetuneDatasetConfig
from selectmoe.config.selection import SelectConfig, SelectionConfig
from selectmoe.errors import ConfigError, DataError
from selectmoe.finetune.sources import choose_rows
from tests.selection_run import finished_run, sample

NUM_ROWS = 400
LENGTHS = np.random.default_rng(0).integers(2, 60, NUM_ROWS).tolist()
DATASETS = ["a" if number % 5 else "b" for number in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The selection prefers long answers, and has another mix of sources than the corpus."""
    rows = [
        sample(number, "word " * LENGTHS[number], dataset=DATASETS[number])
        for number in range(NUM_ROWS)
    ]
    rng = np.random.default_rng(1)
    scores = [
        length / 100 + 0.2 * (name == "b") + 0.1 * rng.random()
        for length, name in zip(LENGTHS, DATASETS, strict=True)
    ]
    root = tmp_path_factory.mktemp("controls") / "run"
    config = SelectConfig(selection_percentage=0.2, rows_per_shard=64)
    return finished_run(root, rows, scores, config=config).root


def numbers(run, mode, *, seed=0):
    dataset = FinetuneDatasetConfig(data_path=str(run), mode=mode)
    rows = choose_rows(dataset, seed=seed)
    found = [int(row.sample_id.removeprefix("row-")) for row in rows.read()]
    assert len(found) == rows.num_rows or mode == "selected"
    return found


def mix(chosen):
    return Counter(DATASETS[number] for number in chosen)


def test_a_matched_draw_has_rows_sources_and_answer_tokens_of_the_selection(run):
    selected = numbers(run, "selected")
    wanted = sum(LENGTHS[number] for number in selected)
    draws = [numbers(run, "random_matched", seed=seed) for seed in range(5)]
    for draw in draws:
        assert len(set(draw)) == len(selected) == 80
        assert mix(draw) == mix(selected)
        assert abs(sum(LENGTHS[number] for number in draw) - wanted) <= 0.01 * wanted
        assert set(draw) != set(selected)
    assert numbers(run, "random_matched", seed=2) == draws[2]
    assert len({frozenset(draw) for draw in draws}) == 5
    dataset = FinetuneDatasetConfig(data_path=str(run), mode="random_matched")
    told = choose_rows(dataset, seed=0).description
    assert f"the selection has {wanted:,}" in told
    assert f"{len(set(draws[0]) & set(selected))} of them are selected rows" in told


def test_the_longest_rows_are_as_many_as_were_selected(run):
    longest = numbers(run, "longest")
    assert len(set(longest)) == 80
    assert sorted((LENGTHS[n] for n in longest), reverse=True) == sorted(LENGTHS)[:-81:-1]
    assert numbers(run, "longest", seed=9) == longest


def test_a_selection_by_another_strategy_has_matched_draws_too(run, tmp_path):
    rows = [sample(n, "word " * LENGTHS[n], dataset=DATASETS[n]) for n in range(NUM_ROWS)]
    config = SelectConfig(selection=SelectionConfig(strategy="sampled", rows=50, floor=0.2))
    other = finished_run(
        tmp_path / "run", rows, np.linspace(0, 1, NUM_ROWS).tolist(), config=config
    )
    selected, draw = numbers(other.root, "selected"), numbers(other.root, "random_matched")
    assert mix(draw) == mix(selected)
    tokens = [sum(LENGTHS[n] for n in chosen) for chosen in (selected, draw)]
    assert abs(tokens[1] - tokens[0]) <= 0.01 * tokens[0]


def test_a_draw_that_cannot_match_is_refused_with_the_numbers(tmp_path):
    """The one selected row has 50 tokens; its length is rare, and noise rarely prefers it."""
    rows = [sample(number, "word " * (10, 90, 50)[min(number, 2)]) for number in range(2)]
    rows += [sample(number, "word " * (10 if number % 2 else 90)) for number in range(2, 40)]
    rows.append(sample(40, "word " * 50))
    scores = [0.5] * 40 + [0.9]
    run = finished_run(
        tmp_path / "run", rows, scores, config=SelectConfig(selection_percentage=0.01)
    )
    assert numbers(run.root, "random_matched", seed=0) == [40]
    message = r"needs 1 random rows with 50 answer tokens to 1 %.*the nearest draw has 90$"
    with pytest.raises(DataError, match=message):
        numbers(run.root, "random_matched", seed=3)


def test_controls_by_scores_need_a_whole_run(run, tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"prompt": "why", "response": "so"}\n')
    for mode in ("longest", "random_matched"):
        with pytest.raises(ConfigError, match=f"dataset.mode={mode} needs the scores"):
            numbers(file, mode)
    rows = [sample(number, "word") for number in range(5)]
    bare = finished_run(tmp_path / "run", rows, [0.5] * 5)
    manifest = json.loads(bare.manifest.read_text())
    manifest["total"]["num_selected"] = 4
    bare.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="1 rows are kept, and its manifest has 4"):
        numbers(bare.root, "longest")
    for shard in bare.scored_shards():
        shard.unlink()
    with pytest.raises(DataError, match="need the manifest of the selection"):
        numbers(bare.root, "longest")
