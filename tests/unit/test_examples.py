"""Every example does what it says, in at most 25 lines.

They run in this process, where torch is loaded: five fresh ones would take half a minute.
"""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest

from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.engine import ScoringEngine
from serve.settings import ServeSettings
from tests.local_server import LocalScorers, local_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = (
    "custom_reader.py",
    "custom_trash_expert.py",
    "score_client.py",
    "score_in_python.py",
    "select_from_dataset.py",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("score_in_python.py", *arguments): what that example prints, in a folder of the test's
    own."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_there_are_five_and_each_fits_on_a_screen():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*")}
    assert tuple(sorted(lengths)) == NAMES
    assert max(lengths.values()) <= 25


def test_two_answers_are_scored_in_python(run):
    good, bad = run("score_in_python.py").splitlines()
    assert good.startswith("Air scatters blue light more than red light.: score 0.")
    # No line says "None": the embedded selector has a calibration.
    assert float(good.rpartition(" ")[2]) > float(bad.rpartition(" ")[2])


def test_the_best_fifth_of_a_dataset_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert run("select_from_dataset.py").startswith("kept 8 of 40 rows, the lowest score is 0.")
    kept = (tmp_path / "selected_data.jsonl").read_text().splitlines()
    samples = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)][:40]
    scored = ScoringEngine.from_pretrained().score(samples)
    best = sorted(scored, key=lambda sample: sample.score, reverse=True)[:8]
    assert {json.loads(line)["id"] for line in kept} == {sample.sample_id for sample in best}


def test_the_client_prints_scores_and_failures(run):
    settings = ServeSettings()
    with local_server(settings, LocalScorers(settings)) as server:
        prime, words, empty = run("score_client.py", server.url).splitlines()
    assert prime.startswith("prime: score 0.")
    assert words.endswith(" tokens")
    assert empty.startswith("empty: validation: samples[2]: 'messages' must not be empty")


def test_a_custom_trash_expert_is_in_every_layer(run):
    names = run("custom_trash_expert.py")
    assert names.count("trash_expert.scale") == 4


def test_a_custom_reader_gives_rows_to_select_from(run, tmp_path):
    def conversation(name, answer):
        turns = [{"from": "human", "value": "Why is it wet?"}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns}

    chats = [conversation("good", "It rained in the night."), conversation("bad", "wet wet wet")]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    run("custom_reader.py", tmp_path / "chats.json", tmp_path / "kept.jsonl")
    [kept] = read_corpus(str(tmp_path / "kept.jsonl"))
    assert (kept.dataset, kept.sample_id) == ("chats", "good")
