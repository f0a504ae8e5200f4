"""`jobs/fit_weights.py` on rated rows: stored signals, a real selector, and mistakes."""

import json

import numpy as np
import pytest

from selectmoe.cli.fit_weights_command import main
from selectmoe.errors import ConfigError, DataError
from selectmoe.records import Message, Sample
from tests.selection_run import finished_run

NUM_PAIRS = 250


def row(number, answer, **columns):
    messages = [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": answer},
    ]
    return {"dataset": "rated", "id": f"row-{number}", "messages": messages, **columns}


def write(folder, rows):
    file = folder / "rated.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in rows), "utf-8")
    return str(file)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """250 pairs whose better answer has the higher pmi, mostly, and a run that stored it."""
    folder = tmp_path_factory.mktemp("rated")
    random = np.random.default_rng(0)
    rows, samples, pmi, nll = [], [], [], []
    for pair in range(NUM_PAIRS):
        for label in (0, 1):
            number = 2 * pair + label
            answer = f"answer {number} " + "word " * int(random.integers(1, 40))
            rows.append(row(pair, answer, label=label, pair_id=f"pair-{pair}"))
            messages = (Message("user", f"question {pair}"), Message("assistant", answer))
            samples.append(Sample("rated", f"{number}", messages, f"rated.jsonl:{number + 1}"))
            pmi.append(label + random.normal())
            nll.append(random.normal())
    scores = random.uniform(0.2, 0.8, size=len(rows)).tolist()
    finished_run(folder / "run", samples, scores, signals={"pmi": pmi, "nll": nll})
    return write(folder, rows), str(folder / "run"), rows


def test_stored_signals_are_measured_and_weighted(scored, tmp_path, capsys):
    rated, run, _ = scored
    main(["--rated", rated, "--scored", run, "--output", str(tmp_path / "weights.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("500 rows, 250 pairs, 250 prompts\n")
    assert "warning" not in printed
    written = json.loads((tmp_path / "weights.json").read_text("utf-8"))
    assert list(written["signals"]) == ["gate", "nll", "pmi", "length"]
    weights = {name: entry["weight"] for name, entry in written["signals"].items()}
    assert weights["pmi"] > 0.7
    assert all(abs(weights[name]) < 0.4 for name in ("gate", "nll", "length"))
    alone = {name: line["all_rows"]["estimate"] for name, line in written["agreement"].items()}
    assert list(alone) == ["gate", "-nll", "pmi", "length", "together"]
    assert alone["pmi"] > 0.65
    assert alone["together"] == pytest.approx(alone["pmi"], abs=0.05)
    assert written["agreement"]["length"]["like_length"]["num_compared"] < 100


def test_without_a_fit_nothing_is_written(scored, tmp_path, capsys, monkeypatch):
    rated, run, _ = scored
    monkeypatch.chdir(tmp_path)
    main(["--rated", rated, "--scored", run, "--evaluate-only"])
    assert "together" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_few_labels_and_labels_that_follow_length_are_told(tmp_path, capsys):
    rows = [
        row(number, "word " * (40 if number % 2 else 3), label=number % 2) for number in range(40)
    ]
    samples = [
        Sample("r", str(n), tuple(Message(**m) for m in entry["messages"]))
        for n, entry in enumerate(rows)
    ]
    noise = np.random.default_rng(0).uniform(0.2, 0.8, size=40).tolist()
    finished_run(tmp_path / "run", samples, noise)
    arguments = ["--rated", write(tmp_path, rows), "--scored", str(tmp_path / "run")]
    main([*arguments, "--output", str(tmp_path / "weights.json")])
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 2
    assert "40 labels are few" in warnings[0]
    assert "not above answer length alone" in warnings[1]


def test_rows_are_scored_where_no_run_has(tmp_path, capsys):
    rows = [
        row(n, f"{'Air scatters light' if n % 2 else 'xx zz'} number {n}.", label=n % 2)
        for n in range(12)
    ]
    rows.append({"id": "t", "text": "no prompt at all", "label": 1})
    main(["--rated", write(tmp_path, rows), "--output", str(tmp_path / "weights.json")])
    printed = capsys.readouterr().out
    assert printed.startswith("12 rows, rated alone, 12 prompts\n")
    assert "left out: 1 rows that lack pmi" in printed
    assert "together" in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, "a", label=1), row(2, "b", label=1)], "labels must differ, got 1 for all 2 rows"),
        ([row(1, "a", label="good")], r"rated.jsonl:1: label must be a number, got 'good'"),
        ([row(1, "a")], "rated.jsonl:1: a rated row must have a label"),
        ([row(1, "a", label=1, pair_id="p")], "pair 'p' must have two rows, got 1"),
        (
            [row(1, "a", label=1, pair_id="p"), row(1, "b", label=1, pair_id="p")],
            "pair 'p' must have two different labels, got 1 twice",
        ),
        (
            [row(1, "a", label=1, pair_id="p"), row(1, "b", label=0)],
            "pair_id must be in all rated rows or in none; 1 of 2 rows lack it",
        ),
        ([{"prompt": "no answer", "label": 1}], r"rated.jsonl:1: no sample"),
        ([], "no rows: every file is empty"),
    ],
)
def test_ratings_that_cannot_be_read_are_refused(rows, message, scored, tmp_path):
    _, run, _ = scored
    with pytest.raises(DataError, match=message):
        main(["--rated", write(tmp_path, rows), "--scored", run, "--evaluate-only"])


def test_what_a_run_does_not_have_is_refused(scored, tmp_path):
    rated, run, rows = scored
    with pytest.raises(DataError, match="the signal router_entropy is not stored"):
        main(["--rated", rated, "--scored", run, "--signals", "gate", "router_entropy"])
    pair = [row(9, answer, label=n, pair_id="x") for n, answer in enumerate(("one", "two"))]
    other = write(tmp_path, [*rows[:2], *pair])
    with pytest.raises(DataError, match=r"rated.jsonl:3: .* scored no row with this text"):
        main(["--rated", other, "--scored", run, "--evaluate-only"])


def test_settings_that_cannot_work_are_refused_at_once(scored, tmp_path):
    rated, run, _ = scored
    (tmp_path / "weights.json").write_text("{}")
    for arguments, message in (
        ([], "no rated rows: give --rated FILE"),
        (["--rated", rated, "signals=[gate]"], "signals must be two to 5 different names"),
        (["--rated", rated, "signals=[gate,taste]"], "signals must be some of gate"),
        (["--rated", rated, "--output", str(tmp_path / "weights.json")], "must be a new file"),
        (["--rated", rated, "--scored", str(tmp_path)], "--scored must be the folder of a fin"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(arguments)
    assert run
