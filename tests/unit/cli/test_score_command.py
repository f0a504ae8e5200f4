"""`selectmoe score` on files and standard input, with the embedded selector."""

import io
import json
import sys

import pytest

from selectmoe.cli.score_command import main
from selectmoe.errors import ConfigError, DataError
from selectmoe.records import Message, Sample
from selectmoe.scoring.engine import ScoringEngine

ROWS = (
    '{"id": "a", "prompt": "Why is the sky blue?", "response": "Air scatters blue light."}\n'
    '{"id": "b", "prompt": "Why is the sky blue?"}\n'
    '{"id": "c", "text": "Rain falls from clouds."}\n'
)


def scores(printed: str) -> list[dict]:
    return [json.loads(line) for line in printed.splitlines()]


def test_each_row_gets_a_line_in_its_order_with_the_engines_score(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(ROWS, "utf-8")
    main(["--data", str(tmp_path / "rows.jsonl")])
    first, second, third = scores(capsys.readouterr().out)
    engine = ScoringEngine.from_pretrained()
    question, answer = "Why is the sky blue?", "Air scatters blue light."
    sample = Sample("x", "a", (Message("user", question), Message("assistant", answer)))
    [expected] = engine.score([sample])
    # Another batch may round the last digit of a float32 otherwise.
    assert first["score"] == pytest.approx(expected.score, abs=1e-6)
    assert first["percentile"] == pytest.approx(
        engine.calibration.percentile(expected.score), abs=1e-2
    )
    assert (second["score"], second["id"], second["reason"]) == (None, "b", "unknown_layout")
    assert third["id"] == "c"


def test_columns_may_have_names_of_their_own(tmp_path, capsys):
    row = '{"id": "a", "q": "Why is the sky blue?", "a": "Air scatters blue light."}\n'
    (tmp_path / "rows.jsonl").write_text(row, "utf-8")
    main(["--data", str(tmp_path / "rows.jsonl"), "columns={prompt: q, response: a}"])
    [scored] = scores(capsys.readouterr().out)
    assert scored["score"] is not None


def test_standard_input_and_an_output_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ROWS.encode())))
    main(["--data", "-", "--output", str(tmp_path / "scores.jsonl")])
    assert capsys.readouterr().out == ""
    written = scores((tmp_path / "scores.jsonl").read_text("utf-8"))
    assert [row["source"] for row in written] == [f"stdin.jsonl:{row}" for row in (1, 2, 3)]


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no rows to score"):
        main([])
    with pytest.raises(DataError, match="no such file or folder"):
        main(["--data", str(tmp_path / "absent.jsonl")])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="every file is empty"):
        main(["--data", str(tmp_path / "empty.jsonl")])
