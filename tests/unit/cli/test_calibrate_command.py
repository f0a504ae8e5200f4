"""`selectmoe calibrate` on the embedded selector and on weights of stage 1."""

import shutil

import pytest

from selectmoe.cli.calibrate_command import main, sample_rows, told_of_rejected
from selectmoe.data.readers import read_corpora
from selectmoe.errors import ConfigError, DataError
from selectmoe.model.gate_weights import save_gate_weights
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.scoring.engine import ScoringEngine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = DEMO_CORPUS.read_text("utf-8").splitlines()[:40]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def test_a_selector_without_a_calibration_says_how_to_make_it_and_has_it_then(
    corpus, tmp_path, caplog, capsys
):
    ignored = shutil.ignore_patterns("calibration.json")
    selector = shutil.copytree(EMBEDDED_SELECTOR, tmp_path / "selector", ignore=ignored)
    assert ScoringEngine.from_pretrained(selector, device="cpu").calibration is None
    assert "'selectmoe calibrate --model MODEL --data FILES' makes one" in caplog.text
    main(["--model", str(selector), "--data", str(corpus)])
    assert capsys.readouterr().out == f"{selector / 'calibration.json'}\n"
    engine = ScoringEngine.from_pretrained(selector, device="cpu")
    assert engine.length == "adjusted"
    assert engine.calibration.corpus == {"demo": 40}


def test_stage_1_weights_are_calibrated_for_any_formula_and_turns(corpus, tmp_path):
    gates = save_gate_weights(ScoringEngine.from_pretrained(device="cpu").model, tmp_path)
    settings = ("scoring.formula=original", "scoring.turns=last", "num_rows=30")
    main(["--model-checkpoint-path", str(tmp_path), "--data", str(corpus), *settings])
    loaded = ScoringEngine.from_pretrained(
        model_checkpoint_path=gates, device="cpu", formula="original", turns="last"
    )
    assert loaded.calibration.num_samples == 30


def test_rows_are_drawn_evenly_and_keep_their_order(corpus):
    drawn = [sample_rows(read_corpora([str(corpus)]), 10, seed=seed) for seed in range(200)]
    rows = [row.sample_id for row in read_corpora([str(corpus)])]
    places = [[rows.index(row.sample_id) for row in part] for part in drawn]
    assert all(part == sorted(part) and len(set(part)) == 10 for part in places)
    counts = [sum(place in part for part in places) for place in range(40)]
    # 50 expected; the binomial standard deviation is 6.1.
    assert min(counts) > 25
    assert max(counts) < 75


def test_rows_that_are_not_read_are_counted_with_the_first_reason(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"text": "Rain falls."}\n{"id": 3}\n', "utf-8")
    [row] = told_of_rejected(read_corpora([str(file)]))
    assert row.messages[0].content == "Rain falls."
    [message] = caplog.messages
    assert message.startswith(f"2 rows are not read; the first: {file}:1: a row must have")


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no rows to score"):
        main([])
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n', "utf-8")
    with pytest.raises(DataError, match="every row is invalid"):
        main(["--data", str(tmp_path / "rows.jsonl")])
