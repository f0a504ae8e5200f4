"""What a client sees, over real HTTP with the embedded selector, without Ray."""

import asyncio
import concurrent.futures
import json
import logging
import time

import httpx
import pytest
from jsonschema import Draft202012Validator

from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Message, Sample
from selectmoe.scoring.engine import ScoringEngine
from serve.settings import ServeSettings
from tests.local_server import LocalScorers, local_server

GOOD = {"prompt": "Why is the sky blue?", "response": "Air scatters blue light the most."}
# float32 in batches of other shapes; the bound for "the same score".
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def scorers():
    return LocalScorers(ServeSettings(revision="r1"))


@pytest.fixture(scope="module")
def server(scorers):
    settings = ServeSettings(
        revision="r1", max_samples_per_request=100, max_body_bytes=200_000, max_queued_samples=50
    )
    with local_server(settings, scorers) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine():
    return ScoringEngine.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def samples():
    rows = [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)]
    return rows[::15]


def wire(sample):
    messages = [{"role": entry.role, "content": entry.content} for entry in sample.messages]
    return {"id": sample.sample_id, "messages": messages}


def post(client, samples, **more):
    answer = client.post("/score", json={"samples": samples, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_scores_are_the_engine_s_in_the_order_of_the_list(client, engine, samples):
    results = post(client, [wire(sample) for sample in samples])["results"]
    for result, expected in zip(results, engine.score(samples), strict=True):
        assert result["id"] == expected.sample_id
        assert result["score"] == pytest.approx(expected.score, abs=TOLERANCE)
        assert result["num_tokens"] == expected.num_tokens
        assert result["truncated"] == expected.truncated


def test_one_sample_has_the_score_that_it_has_in_a_list(client):
    [alone] = post(client, GOOD)["results"]
    [listed, _] = post(client, [GOOD, {"text": "another " * 300}])["results"]
    assert alone["score"] == pytest.approx(listed["score"], abs=TOLERANCE)


def test_the_answer_says_what_scored_and_how_much_was_read(client, server):
    content = post(client, [GOOD, {"text": "word " * 3_000}, {"messages": []}])
    first, long, bad = content["results"]
    assert (content["model"], content["revision"]) == ("embedded", "r1")
    assert content["usage"]["tokens"] == first["num_tokens"] + long["num_tokens"]
    assert (long["truncated"], long["num_tokens"]) == (True, 1_024)
    kind = {"error_type": "validation", "reason": "messages_empty"}
    assert bad == {"id": None, "error": bad["error"]} | kind


def test_percentiles_are_the_calibration_s(client, server):
    content = post(client, GOOD)
    [result] = content["results"]
    calibration = server.service.description.calibration
    if calibration is None:
        assert content["calibration"] is None
        assert result["percentile"] is None
    else:
        assert content["calibration"]["weights_hash"] == calibration.weights_hash
        assert result["percentile"] == calibration.percentile(result["score"])


def test_layers_are_those_of_the_scored_corpus(client, engine):
    [result] = post(client, GOOD, detail="layers")["results"]
    messages = (Message("user", GOOD["prompt"]), Message("assistant", GOOD["response"]))
    [expected] = engine.score([Sample("", "", messages)])
    assert result["layers"] == pytest.approx(expected.layer_scores.tolist(), abs=1e-5)
    assert "tokens" not in result


def test_tokens_cover_the_conversation_and_say_who_speaks(client):
    [result] = post(client, GOOD, detail="tokens")["results"]
    tokens = result["tokens"]
    assert len(tokens) == result["num_tokens"]
    answer = "".join(token["text"] for token in tokens if token["is_answer"])
    assert answer.startswith(GOOD["response"])
    assert all(0 <= token["score"] <= 1 for token in tokens)
    places = [(token["start"], token["end"]) for token in tokens]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error_type"),
    [
        ("GET", "/nothing", None, 404, "not_found"),
        ("GET", "/score", None, 405, "method_not_allowed"),
        ("POST", "/score", b"{", 422, "validation"),
        ("POST", "/score", b'{"samples": {"text_1": "a"}}', 422, "validation"),
        ("POST", "/score", json.dumps({"samples": [GOOD] * 101}).encode(), 413, "too_large"),
        ("POST", "/score", b" " * 200_001, 413, "too_large"),
        ("POST", "/score", iter([b" " * 150_000] * 2), 413, "too_large"),  # no length is declared
    ],
)
def test_every_error_has_the_one_shape(client, method, path, body, status, error_type):
    answer = client.request(method, path, content=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == error_type


def test_a_full_queue_answers_429_to_one_and_to_many_and_empties_again(client, server):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with server.scorers.held():
            waiting = pool.submit(post, client, [GOOD] * 60)
            while server.service._batcher.num_accepted < 50:
                time.sleep(0.01)
            for samples in (GOOD, [GOOD] * 3):
                answer = client.post("/score", json={"samples": samples})
                assert answer.status_code == 429
                assert answer.json()["error_type"] == "overloaded"
                assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert len(waiting.result()["results"]) == 60
    assert post(client, GOOD)["results"][0]["score"] > 0


def test_a_client_that_left_is_not_scored(client, server):
    with server.scorers.held():
        with pytest.raises(httpx.ReadTimeout):
            client.post("/score", json={"samples": GOOD}, timeout=0.3)
        before = server.scorers.num_batches
        with pytest.raises(httpx.ReadTimeout):
            client.post("/score", json={"samples": [GOOD] * 5}, timeout=0.3)
        while server.service._batcher.num_accepted:
            time.sleep(0.01)
    assert server.scorers.num_batches <= before + 1  # what was on its way already


def test_a_server_that_drains_answers_what_it_has_and_refuses_the_rest(scorers):
    with (
        local_server(ServeSettings(), scorers) as running,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=running.url, timeout=30) as client,
    ):
        loop = running.server.servers[0].get_loop()
        with scorers.held():
            waiting = pool.submit(post, client, GOOD)
            while not running.service._batcher.num_accepted:
                time.sleep(0.01)
            draining = asyncio.run_coroutine_threadsafe(running.service.drain(), loop)
            while client.get("/health/ready").status_code == 200:
                time.sleep(0.01)
            refused = client.post("/score", json={"samples": GOOD})
            assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
            assert not draining.done()
        assert waiting.result()["results"][0]["score"] > 0
        draining.result(timeout=30)


def test_ready_says_no_while_a_scorer_is_missing(client, server):
    assert client.get("/health/ready").json() == {"status": "ready"}
    server.service.num_ready, held = 0, server.service.num_ready
    answer = client.get("/health/ready")
    server.service.num_ready = held
    assert answer.status_code == 503
    assert answer.json()["error_type"] == "unavailable"
    assert "retry-after" in answer.headers
    assert client.get("/health/live").status_code == 200


def test_a_stuck_scorer_leaves_the_others_to_their_work(scorers, monkeypatch):
    settings = ServeSettings(num_replicas=2)
    monkeypatch.setattr(scorers, "num_alive", 2)
    with (
        local_server(settings, scorers) as running,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=running.url, timeout=20) as client,
    ):
        with scorers.held(num_batches=2):  # as many as one scorer is sent
            stuck = [{"text": "word " * 1_000}] * 8
            waiting = pool.submit(client.post, "/score", json={"samples": stuck})
            while running.service._batcher.num_in_flight < 2:
                time.sleep(0.01)
            scorers.num_alive = 0  # the health check waits for the stuck one, and times out
            while running.service.why_unready() is None:
                time.sleep(0.01)
            assert client.get("/health/ready").status_code == 503
            assert client.post("/score", json={"samples": GOOD}).status_code == 200
            assert not waiting.done()
        assert waiting.result().status_code == 200


def test_a_service_whose_batches_have_ended_is_unready_and_unhealthy():
    scorers = LocalScorers(ServeSettings())
    with local_server(ServeSettings(), scorers) as running:
        scorers.num_alive = None  # a bug, as it were
        deadline = time.monotonic() + 10
        while (answer := httpx.get(f"{running.url}/health/ready")).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert answer.status_code == 503
        with pytest.raises(RuntimeError, match="ended"):
            running.service.check_health()


def test_info_tells_model_limits_and_versions(client, server):
    information = client.get("/info").json()
    assert information["model"] == "embedded"
    assert len(information["weights_hash"]) == 64
    assert information["formula"] == "answer_margin"
    assert information["limits"]["max_samples_per_request"] == 100
    assert {"selectmoe", "torch", "ray"} <= set(information["versions"])


def test_metrics_count_what_was_asked(client):
    client.get("/nothing/of/this/name")
    text = client.get("/metrics").text
    assert 'selectmoe_serve_requests_total{route="/score",status="200"}' in text
    assert 'selectmoe_serve_requests_total{route="other",status="404"}' in text
    assert "/nothing" not in text


def test_answers_are_as_documented_and_every_example_works(client):
    document = client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ScoreResponse", "components": document["components"]}
    validator = Draft202012Validator(schema)
    operation = document["paths"]["/score"]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        answer = client.post("/score", json=example["value"])
        assert answer.status_code == 200, answer.text
        validator.validate(answer.json())


def test_every_documented_error_is_json_in_the_one_shape(client):
    reference = {"$ref": "#/components/schemas/ErrorResponse"}
    document = client.get("/openapi.json").json()
    assert "ErrorResponse" in document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status != "200":
                    assert response["content"] == {"application/json": {"schema": reference}}


def test_pages_ask_nobody_else(client):
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.fixture(scope="module")
def locked(scorers):
    with local_server(ServeSettings(api_key="open-sesame"), scorers) as running:
        yield running


@pytest.mark.parametrize("path", ["/info", "/metrics", "/nothing"])
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Basic open-sesame", "open-sesame", "Bearer schl\xfcssel"]
)
def test_without_the_key_there_is_a_401(locked, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.get(locked.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error_type"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_key_samples_are_scored(locked):
    headers = {"Authorization": "Bearer open-sesame"}
    answer = httpx.post(locked.url + "/score", json={"samples": GOOD}, headers=headers)
    assert answer.status_code == 200
    refused = httpx.post(locked.url + "/score", json={"samples": GOOD})
    assert refused.status_code == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/health/live", "/health/ready"])
def test_pages_and_health_need_none(locked, path):
    assert httpx.get(locked.url + path).status_code == 200


def test_no_log_holds_a_sample_or_a_key(scorers, caplog, monkeypatch):
    def fail(*_):
        raise ValueError("the secret text of a sample")

    caplog.set_level(logging.DEBUG)
    with local_server(ServeSettings(api_key="open-sesame"), scorers) as running:
        headers = {"Authorization": "Bearer open-sesame"}
        body = {"samples": {"prompt": "the secret text", "response": "of a sample"}}
        monkeypatch.setattr(running.service, "_outcomes", fail)
        answer = httpx.post(running.url + "/score", json=body, headers=headers)
        monkeypatch.setattr(scorers.scorer, "_engine", None)  # the model fails
        monkeypatch.undo()
    assert answer.status_code == 500
    assert answer.json()["error_type"] == "internal"
    assert "secret" not in answer.text
    assert "a request failed: ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert "open-sesame" not in caplog.text
