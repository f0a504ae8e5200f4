"""Who scores makes no difference to what is selected: actors, a deployment's handle, a server."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.stage_2_selection.command import find_backend
from jobs.stage_2_selection.ray_runner import RayRunner
from jobs.stage_2_selection.shard_scorer import ShardScorer
from selectmoe.client import ScoreClient
from selectmoe.client.requests import parse_info
from selectmoe.config.engine import EngineConfig
from selectmoe.config.selection import SelectConfig
from selectmoe.corpus.normalize import write_shards
from selectmoe.data.readers import read_corpora
from selectmoe.errors import ConfigError, ServerUnavailableError, UnauthorizedError
from selectmoe.model.checkpoint import hash_weights
from selectmoe.paths import DEMO_CORPUS, EMBEDDED_SELECTOR
from selectmoe.scoring.calibration import as_json
from selectmoe.scoring.engine import ScoringEngine
from selectmoe.selection.backends import HttpScorer, require_agreement
from serve.settings import ServeSettings
from tests.command_here import CommandHere
from tests.local_server import LocalScorers, local_server
from tests.ray_head import free_port, ray_head
from tests.score_server import ScoreServer, Trouble, running
from tests.serve_process import PATIENCE

# The first test that needs it starts a cluster and a server, too.
pytestmark = pytest.mark.timeout(300)

# Refuses a conversation that the system begins, as some models' templates do.
REFUSING_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
)


def new_engine() -> ScoringEngine:
    engine = ScoringEngine.from_pretrained()
    engine.tokenizer.template = REFUSING_TEMPLATE
    return engine


@pytest.fixture
def server():
    with running(ScoreServer(ScoringEngine.from_pretrained())) as app:
        yield app


@pytest.fixture
def shards(tmp_path):
    """Six shards of 8 rows; three rows are refused by REFUSING_TEMPLATE."""
    lines = DEMO_CORPUS.read_text("utf-8").splitlines()[::13][:45]
    for number in range(3):
        turns = [
            {"role": "system", "content": f"Be {number}."},
            {"role": "assistant", "content": "I am."},
        ]
        lines.append(json.dumps({"id": f"system-{number}", "messages": turns}))
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(lines), "utf-8")
    write_shards(read_corpora([str(file)]), tmp_path / "corpus", rows_per_shard=8)
    return sorted((tmp_path / "corpus").glob("shard-*.parquet"))


def batch(shards: list[Path]) -> dict[str, np.ndarray]:
    return {"shard": np.array(list(map(str, shards)))}


def tables(folder: Path) -> list[dict]:
    return [pq.read_table(file).to_pydict() for file in sorted(folder.glob("shard-*.parquet"))]


def test_a_server_gives_every_row_of_a_shard_what_the_engine_gives_it(shards, tmp_path):
    own = ShardScorer(new_engine, tmp_path / "own", shards_in_flight=1)
    counts = own(batch(shards))
    with running(ScoreServer(new_engine())) as server:
        asking = ShardScorer(
            lambda: HttpScorer(server.url, None, dtype="float32"),
            tmp_path / "asked",
            shards_in_flight=3,
        )
        asked = asking(batch(shards))
    for key in ("shard", "num_rows", "num_tokens", "num_truncated", "num_unscored", "failure"):
        assert asked[key] == counts[key]
    assert sum(counts["num_unscored"]) == 3
    # Every column to the last bit, reasons of rejected rows included.
    assert tables(tmp_path / "asked") == tables(tmp_path / "own")
    assert 1 < server.most_at_once <= 3
    assert all(body["batching"] == "own" for path, body in server.requests if path == "/score")


def test_the_service_gives_a_shard_what_the_engine_gives_it_whatever_else_it_is_asked(
    shards, tmp_path
):
    selector = tmp_path / "selector"
    shutil.copytree(EMBEDDED_SELECTOR, selector)
    (selector / "chat_template.jinja").write_text(REFUSING_TEMPLATE, "utf-8")
    own = ShardScorer(
        lambda: ScoringEngine.from_pretrained(selector), tmp_path / "own", shards_in_flight=1
    )
    own(batch(shards))
    settings = ServeSettings(model=str(selector), api_key="key-of-the-test")
    is_over = threading.Event()

    def keep_asking(url: str) -> None:
        sample = {"prompt": "Why is the sky blue?", "response": "Air scatters blue light the most."}
        with ScoreClient(url, api_key=settings.api_key) as client:
            while not is_over.wait(0.02):
                client.score_many([sample, {"text": "Twice."}])

    with local_server(settings, LocalScorers(settings)) as service:
        traffic = threading.Thread(target=keep_asking, args=[service.url])
        traffic.start()
        asking = ShardScorer(
            lambda: HttpScorer(service.url, settings.api_key, dtype="float32"),
            tmp_path / "asked",
            shards_in_flight=3,
        )
        asked = asking(batch(shards))
        is_over.set()
        traffic.join()
    assert sum(asked["num_unscored"]) == 3
    assert tables(tmp_path / "asked") == tables(tmp_path / "own")


def test_a_server_that_refuses_is_a_row_and_what_was_scored_before_is_kept(
    server, shards, tmp_path
):
    asking = ShardScorer(
        lambda: HttpScorer(server.url, None, dtype="float32"),
        tmp_path / "scored",
        shards_in_flight=1,
    )
    asking(batch(shards[:2]))
    server.api_key = "changed"
    [failure] = asking(batch(shards))["failure"]
    assert "no API key was sent" in failure
    server.api_key = None
    assert asking(batch(shards))["shard"] == [shard.name for shard in shards[2:]]


def test_rows_that_a_server_takes_for_no_samples_end_the_run(server, shards, tmp_path):
    """They were read by the same rules here: the server is another version, and no row is bad."""
    body = b'{"error": "detail is not a field here", "error_type": "validation"}'
    server.troubles = [Trouble(422, body=body)]
    asking = ShardScorer(
        lambda: HttpScorer(server.url, None, dtype="float32"),
        tmp_path / "scored",
        shards_in_flight=1,
    )
    [failure] = asking(batch(shards[:1]))["failure"]
    assert "detail is not a field here" in failure
    assert not (tmp_path / "scored").exists()


def test_shards_beyond_the_servers_limit_are_scored_in_parts(server, shards, tmp_path):
    server.max_samples = 3
    asking = ShardScorer(
        lambda: HttpScorer(server.url, None, dtype="float32"),
        tmp_path / "parts",
        shards_in_flight=1,
    )
    asking(batch(shards))
    own = ShardScorer(ScoringEngine.from_pretrained, tmp_path / "own", shards_in_flight=1)
    own(batch(shards))
    for parts, whole in zip(tables(tmp_path / "parts"), tables(tmp_path / "own"), strict=True):
        # Other batch mates: float32 rounds otherwise, as DESIGN's 1e-5 allows.
        assert parts["score"] == pytest.approx(whole["score"], rel=0, abs=1e-5)
        assert parts["num_answer_tokens"] == whole["num_answer_tokens"]


def test_a_server_that_scores_otherwise_than_the_configuration_says_is_refused(server):
    info = parse_info(server.info())
    require_agreement(SelectConfig(), "here", info)
    require_agreement(SelectConfig(model=str(EMBEDDED_SELECTOR)), "here", info)
    for setting, rule in [
        ({"formula": "original"}, "scoring.formula is original here, and here scores with answer"),
        (
            {"max_tokens_per_batch": 9},
            "give scoring.max_tokens_per_batch=4096 or name ",
        ),
        ({"dtype": "bfloat16"}, "scoring.dtype is bfloat16 here"),
        ({"length": "raw"}, "scoring.length is raw here, and here scores with adjusted"),
        ({"turns": "last"}, "scoring.turns is last here, and here scores with all"),
        (
            {"attn_implementation": "eager"},
            "scoring.attn_implementation applies to via=actors",
        ),
    ]:
        with pytest.raises(ConfigError, match=rule):
            require_agreement(SelectConfig(scoring=EngineConfig(**setting)), "here", info)
    other = dataclasses.replace(info, weights_hash="f" * 64)
    require_agreement(SelectConfig(), "here", other)
    with pytest.raises(ConfigError, match="here scores with other weights"):
        require_agreement(SelectConfig(model=str(EMBEDDED_SELECTOR)), "here", other)


def found(config):
    return find_backend(config, RayRunner(config))


def test_the_model_is_the_servers_where_none_is_given(server):
    place = found(SelectConfig(via=server.url))
    assert place.model == "embedded"
    own = found(SelectConfig()).calibration()
    assert as_json(place.calibration()) == as_json(own)
    assert place.weights_sha256 == hash_weights(str(EMBEDDED_SELECTOR), None)


def test_a_server_that_is_not_there_or_wants_a_key_ends_a_run_before_it_begins(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("selectmoe.selection.backends.INFO_TIMEOUT_SECONDS", 0.5)
        with pytest.raises(ServerUnavailableError, match=r"not available within 0\.5 s"):
            found(SelectConfig(via=f"http://127.0.0.1:{free_port()}"))
    server.api_key = "secret"
    with pytest.raises(UnauthorizedError, match="no API key was sent"):
        found(SelectConfig(via=server.url))
    monkeypatch.setenv("SELECTMOE_API_KEY", "secret")
    assert found(SelectConfig(via=server.url)).model == "embedded"


@pytest.fixture(scope="module")
def cluster(repository, tmp_path_factory):
    """A Ray head with the real application on it; the variables by which jobs find both."""
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    url = f"http://127.0.0.1:{free_port()}"
    environment = {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "PYTHONPATH": str(repository),
        "SELECTMOE_API_KEY": "key-of-the-test",
        **PATIENCE,
    }
    with ray_head(
        folder, "--include-dashboard=false", "--num-cpus=2", port=port,
        environment=os.environ | environment,
    ):  # fmt: skip
        start = (
            "import ray; from ray import serve; ray.init(log_to_driver=False)\n"
            f"serve.start(http_options={{'host': '127.0.0.1', 'port': {url.rpartition(':')[2]}}})\n"
            "from serve.app import app; serve.run(app)"
        )
        serving = subprocess.run(
            [sys.executable, "-c", start], cwd=repository, env=os.environ | environment,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert serving.returncode == 0, serving.stderr
        yield environment | {"url": url}


@pytest.fixture
def there(cluster, monkeypatch):
    """Commands of this test find the cluster and its server."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def by_actors(corpus, cluster, tmp_path_factory):
    """The run that every other one is held to."""
    output = tmp_path_factory.mktemp("actors") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster["RAY_ADDRESS"])
        CommandHere(output.parent).run(
            "--pct", "0.2", "--data", corpus, "--output", output, "--num-actors", "1",
            "rows_per_shard=15",
        )  # fmt: skip
    return output


def selected(output: Path) -> bytes:
    return (output / "selected_data.jsonl").read_bytes()


def manifest(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text("utf-8"))


def assert_same_run(output: Path, reference: Path) -> None:
    assert selected(output) == selected(reference)
    assert tables(output / "scored") == tables(reference / "scored")
    for key in ("total", "datasets", "thresholds", "score_quantiles", "calibration"):
        assert manifest(output)[key] == manifest(reference)[key]
    ours, theirs = manifest(output)["scoring"], manifest(reference)["scoring"]
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["num_tokens"] == theirs["num_tokens"]


def test_the_handle_of_the_deployment_gives_the_bytes_of_actors(
    there, job, corpus, by_actors, tmp_path
):
    job.run(
        "--pct", "0.2", "--data", corpus, "--output", tmp_path / "run", "--via", "serve",
        "rows_per_shard=15",
    )  # fmt: skip
    assert_same_run(tmp_path / "run", by_actors)


def test_a_run_that_its_server_ends_goes_on_with_another_to_the_bytes_of_actors(
    cluster, there, corpus, by_actors, tmp_path
):
    select_here = CommandHere(tmp_path)
    output = tmp_path / "run"
    with running(ScoreServer(ScoringEngine.from_pretrained(), api_key="key-of-the-test")) as server:
        refusal = Trouble(500, body=b'{"error": "broken", "error_type": "internal"}')
        server.troubles = [Trouble(429), None, Trouble(0), Trouble(503), None, refusal]
        line = select_here.refuse(
            "--pct", "0.2", "--data", corpus, "--output", output, "--via", server.url,
            "rows_per_shard=15", "shards_in_flight=1",
        )  # fmt: skip
    assert f"answered 500: broken; resume with --resume {output}" in line
    select_here.run("--resume", output, "--via", cluster["url"])
    # At least the two before the refusal; the actor may have begun another batch meanwhile.
    assert 2 <= manifest(output)["scoring"]["num_shards_reused"] < 8
    assert selected(output) == selected(by_actors)
    assert manifest(output)["total"] == manifest(by_actors)["total"]
    saved = [file.read_text("utf-8") for file in output.glob("*.json*")]
    assert "key-of-the-test" not in line + "".join(saved)
