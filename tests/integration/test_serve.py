"""The service as users run it: real Ray Serve, real HTTP, replicas that die, a real browser."""

import collections
import concurrent.futures
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from selectmoe.data.readers import read_corpus
from selectmoe.paths import DEMO_CORPUS
from selectmoe.records import Sample
from selectmoe.scoring.engine import ScoringEngine
from serve.local_ray import ENVIRONMENT
from tests.ray_head import free_port
from tests.serve_process import serve_run, started

pytestmark = pytest.mark.timeout(300)
GOOD = {"prompt": "Why is the sky blue?", "response": "Air scatters blue light the most."}
KEY = "key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TOLERANCE = 1e-6  # what the service promises against the select job
MAX_QUEUED_SAMPLES = 64


@pytest.fixture(scope="module")
def samples():
    return [row for row in read_corpus(str(DEMO_CORPUS)) if isinstance(row, Sample)][::6]


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    """serve.yaml with two scorers, on a free port of this machine."""
    folder = tmp_path_factory.mktemp("serve")
    config = yaml.safe_load((repository / "serve" / "serve.yaml").read_text("utf-8"))
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["runtime_env"]["env_vars"] |= {
        "SELECTMOE_MAX_REPLICAS": "",
        "SELECTMOE_MAX_QUEUED_SAMPLES": str(MAX_QUEUED_SAMPLES),
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {**ENVIRONMENT, "SELECTMOE_API_KEY": KEY, "PYTHONPATH": str(repository)}
    with serve_run(
        folder / "serve.yaml",
        url=f"http://127.0.0.1:{port}",
        folder=folder,
        environment=environment,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as opened:
        yield opened


def wire(sample):
    messages = [{"role": entry.role, "content": entry.content} for entry in sample.messages]
    return {"id": sample.sample_id, "messages": messages}


def test_scores_are_the_engine_s_with_bad_neighbours_in_the_list(client, samples):
    body = [wire(sample) for sample in samples]
    body.insert(3, {"messages": []})
    body.insert(9, {"id": "odd", "text": 5})
    answer = client.post("/score", json={"samples": body})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert {results[place]["error_type"] for place in (3, 9)} == {"validation"}
    scored = [result for place, result in enumerate(results) if place not in (3, 9)]
    expected = ScoringEngine.from_pretrained(device="cpu").score(samples)
    assert [result["id"] for result in scored] == [entry.sample_id for entry in expected]
    for result, entry in zip(scored, expected, strict=True):
        assert math.isfinite(result["score"])
        assert result["score"] == pytest.approx(entry.score, abs=TOLERANCE)


@pytest.mark.parametrize("detail", ["layers", "tokens"])
def test_details_arrive(client, detail):
    answer = client.post("/score", json={"samples": GOOD, "detail": detail})
    [result] = answer.json()["results"]
    assert len(result[detail]) == (4 if detail == "layers" else result["num_tokens"])


@pytest.mark.parametrize(
    ("request_parts", "status"),
    [
        ({"method": "POST", "url": "/score", "headers": {"Authorization": "Bearer x"}}, 401),
        ({"method": "GET", "url": "/nothing"}, 404),
        ({"method": "PUT", "url": "/score"}, 405),
        ({"method": "POST", "url": "/score", "content": b" " * 4_194_305}, 413),
        (
            {
                "method": "POST",
                "url": "/score",
                "content": b"{}",
                "headers": {"Content-Encoding": "lzma"},
            },
            415,
        ),
        ({"method": "POST", "url": "/score", "content": b"{}"}, 422),
    ],
)
def test_every_refusal_has_its_status_and_the_one_shape(client, request_parts, status):
    answer = client.request(**request_parts)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}


def test_the_proxies_take_what_clients_send(server, client):
    """The proxies are set up while the service starts: unit tests try every kind of request."""
    body = b'{"samples": {"text": "The sea rises."}}'
    offer = (
        f"POST /score/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        "HTTP2-Settings: AAMAAABkAAQBAAAA\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=30) as connection:
        connection.sendall(offer.encode())
        time.sleep(0.1)
        connection.sendall(body)
        assert b"200 OK" in connection.recv(65_536)
        connection.sendall(b"\0\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65_536), b""))  # the server closes
    assert b" 400 Bad Request" in received
    assert b'"error_type":"bad_request"' in received
    assert client.head("/health/ready").status_code == 200


def test_a_full_queue_answers_429_and_every_accepted_request_is_answered(client, samples):
    body = {"samples": [wire(sample) for sample in samples[:16]]}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: client.post("/score", json=body), range(64)))
    statuses = collections.Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert len(answer.json()["results"]) == 16
        else:
            assert int(answer.headers["retry-after"]) >= 1


def test_metrics_are_on_the_http_port(client):
    client.post("/score", json={"samples": GOOD})
    answer = client.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    scored = families["selectmoe_serve_samples"].samples
    assert sum(sample.value for sample in scored if sample.labels["outcome"] == "scored") >= 1
    assert families["selectmoe_serve_tokens"].samples[0].value > 0
    assert families["selectmoe_serve_scorers_ready"].samples[0].value == 2


def test_no_answer_contradicts_the_documentation(server, tmp_path):
    """Short; docs/serving.md has the command for the 2,000 cases."""
    finished = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json",
         "--header", f"Authorization:Bearer {KEY}", "--max-examples", "15", "--seed", "1",
         # Not the checks of what a schema cannot say: one bad sample of a list is no bad request.
         "--exclude-checks", "positive_data_acceptance,negative_data_rejection",
         "--phases", "examples,fuzzing", "--no-color", "--generation-database", "none"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr


class Load:
    """Clients that ask again and again; notes the status of every answer."""

    def __init__(self, url, num_clients=3):
        self.url = url
        self.statuses = collections.Counter()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _ask(self):
        with httpx.Client(base_url=self.url, headers=HEADERS, timeout=90) as client:
            while not self.stopping.is_set():
                answer = client.post("/score", json={"samples": [GOOD] * 4})
                self.statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    assert set(answer.json()) == {"error", "error_type"}
                time.sleep(0.05)  # leaves the cores to the replica that starts


@pytest.mark.parametrize("deployment", ["Scorer", "Ingress"])
def test_a_killed_replica_costs_no_more_than_a_503_and_is_replaced(server, deployment):
    with Load(server.url) as load:
        while load.statuses[200] < 20:
            time.sleep(0.05)
        killed = server.replicas(deployment)[0]
        killed.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while server.is_ready():  # unready after the next health check
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.wait_until_ready(timeout_seconds=90)
        before = load.statuses[200]
        while load.statuses[200] < before + 20:
            time.sleep(0.05)
    assert set(load.statuses) <= {200, 429, 503}, load.statuses
    assert killed.pid not in [replica.pid for replica in server.replicas(deployment)]


@pytest.fixture
def page(browser, server):
    page = browser.new_page()
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.close()
    assert all(url.startswith((server.url, "data:")) for url in requests)
    assert problems == []


def test_the_first_page_asks_for_the_key_and_scores_a_sample(page, server, client):
    page.goto(server.url)
    page.fill("#prompt", GOOD["prompt"])
    page.fill("#response", GOOD["response"])
    page.click("#send")
    page.wait_for_selector("#key", state="visible")
    assert "Authorization" in page.inner_text("#failure")
    page.fill("#key", KEY)
    page.click("#send")
    page.wait_for_selector("#score", state="visible")
    [result] = client.post("/score", json={"samples": GOOD}).json()["results"]
    assert float(page.inner_text("#score")) == pytest.approx(result["score"], abs=1e-4)
    assert page.locator("#tokens span").count() == result["num_tokens"]


def test_the_documentation_executes_every_operation(page, server):
    page.goto(f"{server.url}/docs")
    page.fill("#key", KEY)
    sections = page.locator("section")
    for number in range(sections.count()):
        section = sections.nth(number)
        section.get_by_role("button", name="Execute").click()
        output = section.locator("pre.output")
        output.get_by_text("200").first.wait_for()
        if "/score" in section.locator("h2").inner_text():
            assert '"score"' in output.inner_text()
    assert sections.count() == 5


def test_python_m_serve_says_little_leaves_no_token_and_finishes_what_was_accepted(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "HOME": str(tmp_path), "SELECTMOE_PORT": str(port), "PYTHONPATH": None,
        "RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None,
    }  # fmt: skip
    command = [sys.executable, "-m", "serve", "--host", "127.0.0.1"]
    with (
        started(command, url=url, folder=tmp_path, environment=environment) as running,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        [line] = running.printed().splitlines()
        assert line == f"serving embedded on {url}; Ctrl-C stops it"
        assert not (tmp_path / ".ray").exists()
        long = {"samples": [{"text": "word " * 1_000}] * 16}
        asked = [pool.submit(httpx.post, f"{url}/score", json=long, timeout=60) for _ in range(2)]
        while _accepted(url) < 32:
            time.sleep(0.02)
        running.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in asked]
        assert [answer.status_code for answer in answers] == [200] * 2
        running.process.wait(timeout=60)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health/live")


def test_serve_run_beyond_this_machine_without_a_key_ends_in_one_line(repository):
    """Before Ray starts, so nothing listens for a moment either."""
    finished = subprocess.run(
        [Path(sys.executable).with_name("serve"), "run", "serve.app:app"],
        cwd=repository, capture_output=True, text=True, timeout=60,
        env={**os.environ, "RAY_SERVE_DEFAULT_HTTP_HOST": "0.0.0.0", "SELECTMOE_API_KEY": ""},
    )  # fmt: skip
    assert finished.returncode == 1
    [line] = [line for line in finished.stderr.splitlines() if "INFO" not in line]
    assert line.startswith("error: SELECTMOE_API_KEY must be set to serve on 0.0.0.0")


def _accepted(url):
    text = httpx.get(f"{url}/metrics", timeout=30).text
    [family] = [
        family for family in text_string_to_metric_families(text)
        if family.name == "selectmoe_serve_accepted_samples"
    ]  # fmt: skip
    return family.samples[0].value
