"""Signals in scored/, in the manifest and in the lines of `selectmoe score`, by real selectors."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selectmoe import select
from selectmoe.cli.score_command import main as score
from selectmoe.client import ServerInfo
from selectmoe.config.engine import EngineConfig
from selectmoe.config.selection import SelectConfig
from selectmoe.errors import ConfigError
from selectmoe.records import SampleSignals, ScoredSample, UnscoredSample
from selectmoe.selection.backends import require_agreement
from selectmoe.selection.scored_shards import SCORED_SCHEMA
from selectmoe.selection.signal_columns import count_missing, with_signal_columns
from serve.settings import ServeSettings

ROWS = [
    {"id": "a", "prompt": "Why is the sky blue?", "response": "Air scatters blue light."},
    {"id": "b", "prompt": "Why is snow white?", "response": "It scatters every color."},
    {"id": "c", "text": "Rain falls from clouds."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "run"
    signals = ("nll", "pmi", "vector")
    select(ROWS, pct=1.0, output=folder, scoring__signals=signals, report="none")
    return folder


def test_signals_are_columns_beside_the_scores(run, tmp_path):
    select(ROWS, pct=1.0, output=tmp_path / "plain", report="none")
    [file], [plain] = (
        list((folder / "scored").glob("*.parquet")) for folder in (run, tmp_path / "plain")
    )
    table = pq.read_table(file)
    assert table.drop_columns(["nll", "pmi", "vector"]).equals(pq.read_table(plain))
    assert pq.read_schema(plain).names == SCORED_SCHEMA.names
    assert table.schema.field("vector").type.value_type == pa.float16()
    rows = {row["id"]: row for row in table.to_pylist()}
    assert np.linalg.norm(np.float32(rows["a"]["vector"])) == pytest.approx(1, abs=1e-2)
    assert rows["a"]["nll"] > 0
    assert rows["a"]["pmi"] is not None
    assert rows["c"]["nll"] > 0
    assert rows["c"]["pmi"] is None


def test_the_manifest_counts_scored_rows_without_a_value(run):
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    assert manifest["scoring"]["signals"] == {"nll": 0, "pmi": 1, "vector": 0}
    assert manifest["config"]["scoring.signals"] == ["nll", "pmi", "vector"]


def test_score_prints_the_signals_of_each_row(run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    score(["--data", str(tmp_path / "rows.jsonl"), "scoring.signals=[nll,pmi,vector]"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [file] = (run / "scored").glob("*.parquet")
    stored = {row["id"]: row for row in pq.read_table(file).to_pylist()}
    for line in lines:
        row = stored[line["id"]]
        assert line["nll"] == pytest.approx(row["nll"], abs=1e-5)
        np.testing.assert_allclose(line["vector"], row["vector"], rtol=0, atol=1e-3)
    assert lines[2]["pmi"] is None


def test_a_vector_that_is_missing_is_null_and_counted(tmp_path):
    def scored(signals):
        return ScoredSample("x", 0.5, 1, 1, False, np.zeros(1), signals)

    outcomes = [
        scored(SampleSignals(nll=1.5, vector=np.float16([1, 0]))),
        scored(SampleSignals()),
        UnscoredSample("y", "chat_template", "refused"),
    ]
    scores = pa.table({"score": pa.array([0.5, 0.5, None], pa.float32())})
    table = with_signal_columns(scores, outcomes, {"nll": 1, "vector": 2})
    assert table["nll"].to_pylist() == [1.5, None, None]
    assert table["vector"].to_pylist() == [[1, 0], None, None]
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=2)
    shards = [tmp_path / "shard.parquet"]
    assert count_missing(shards, ["nll", "vector"]) == {"nll": 1, "vector": 1}
    assert count_missing(shards, []) == {}


def test_servers_are_not_asked_for_signals():
    info = ServerInfo.__new__(ServerInfo)
    config = SelectConfig(scoring=EngineConfig(signals=("nll",)))
    with pytest.raises(ConfigError, match=r"scoring.signals needs via=actors, got \['nll'\]"):
        require_agreement(config, "here", info)
    with pytest.raises(ConfigError, match="SELECTMOE_SIGNALS cannot be set, got 'nll'"):
        ServeSettings.from_environment({"SELECTMOE_SIGNALS": "nll"})
