"""Both clients against a real server on a real socket, which scores with the embedded selector."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from selectmoe.client import AsyncScoreClient, ScoreClient
from selectmoe.client.requests import ScoreFailure, ScoreResult
from selectmoe.data.readers import read_corpora
from selectmoe.errors import (
    ConfigError,
    ScoreRejectedError,
    ScoreRequestError,
    ServerUnavailableError,
    UnauthorizedError,
)
from selectmoe.paths import DEMO_CORPUS
from selectmoe.scoring.engine import ScoringEngine
from tests.ray_head import free_port
from tests.score_server import ScoreServer, Trouble, running

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def engine():
    return ScoringEngine.from_pretrained()


@pytest.fixture(scope="module")
def samples():
    return list(read_corpora([str(DEMO_CORPUS)]))[:40]


@pytest.fixture
def server(engine):
    with running(ScoreServer(engine)) as app:
        yield app


class InLoop:
    """An AsyncScoreClient whose calls look like ScoreClient's: each test below tries both."""

    def __init__(self, *arguments, **settings):
        self.runner = asyncio.Runner()
        self.client = AsyncScoreClient(*arguments, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.runner.run(self.client.aclose())
        self.runner.close()

    def __getattr__(self, name):
        return lambda *arguments, **settings: self.runner.run(
            getattr(self.client, name)(*arguments, **settings)
        )


@pytest.fixture(params=[ScoreClient, InLoop], ids=["sync", "async"])
def connect(request):
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **settings: stack.enter_context(
            request.param(*arguments, **settings)
        )


def scores_asked_for(server):
    return [content for path, content in server.requests if path == "/score"]


def test_a_sample_has_the_score_that_the_engine_gives_it(server, connect, engine, samples):
    result = connect(server.url).score(samples[0])
    [expected] = engine.score(samples[:1])
    assert result == ScoreResult(
        samples[0].sample_id, expected.score, None, expected.num_tokens,
        expected.num_answer_tokens, expected.truncated,
    )  # fmt: skip


def test_a_mapping_is_scored_and_its_layers_come_when_asked_for(server, connect):
    result = connect(server.url).score({"prompt": "Why?", "response": "So."}, detail="layers")
    assert 0 < result.score < 1
    assert len(result.layers) > 1


def test_a_list_is_split_at_the_servers_limit_and_put_together_in_order(
    server, connect, engine, samples
):
    server.max_samples = 16
    results = connect(server.url).score_many(samples)
    assert sorted(len(body["samples"]) for body in scores_asked_for(server)) == [8, 16, 16]
    expected = [
        outcome.score for start in (0, 16, 32) for outcome in engine.score(samples[start:][:16])
    ]
    # To the last bit: the same batches, and every digit on the wire.
    assert [result.score for result in results] == expected
    assert [result.sample_id for result in results] == [sample.sample_id for sample in samples]


def test_the_limits_are_asked_for_once(server, connect, samples):
    client = connect(server.url)
    for _ in range(3):
        client.score_many(samples[:2])
    assert [path for path, _ in server.requests].count("/info") == 1
    assert client.score_many([]) == []


def test_one_bad_sample_leaves_its_neighbours_alone(server, connect, samples):
    results = connect(server.url).score_many([samples[0], {"messages": []}, samples[1]])
    assert isinstance(results[0], ScoreResult)
    assert isinstance(results[1], ScoreFailure)
    assert results[1].error_type == "validation"
    assert "'messages' must not be empty" in results[1].error
    assert isinstance(results[2], ScoreResult)


def test_one_bad_sample_by_itself_is_an_exception(server, connect):
    with pytest.raises(ScoreRejectedError, match="'messages' must not be empty") as caught:
        connect(server.url).score({"messages": []})
    assert caught.value.error_type == "validation"


def test_bad_samples_in_a_request_of_their_own_leave_the_rest_of_the_list_alone(
    server, connect, samples
):
    server.max_samples = 2
    bad = [{"id": "x", "messages": []}, {"id": "y", "messages": []}]
    results = connect(server.url).score_many([*samples[:2], *bad])
    assert [type(result) for result in results] == [ScoreResult] * 2 + [ScoreFailure] * 2
    assert [result.sample_id for result in results[2:]] == ["x", "y"]


def test_a_full_queue_a_broken_connection_and_a_restart_are_outlived(server, connect, samples):
    server.troubles = [Trouble(429), Trouble(0), Trouble(503)]
    assert connect(server.url).score(samples[0]).score > 0
    assert len(scores_asked_for(server)) == 4


def test_retry_after_is_waited_for(server, connect, samples):
    server.troubles = [Trouble(429, {"Retry-After": "1"})]
    started = time.perf_counter()
    connect(server.url).score(samples[0])
    assert time.perf_counter() - started >= 1


def test_a_server_that_starts_late_is_waited_for(engine, connect, samples):
    port = free_port()
    with contextlib.ExitStack() as stack:
        late = running(ScoreServer(engine), port=port)
        timer = threading.Timer(0.5, stack.enter_context, [late])
        timer.start()
        assert connect(f"http://127.0.0.1:{port}").score(samples[0]).score > 0
        timer.join()


def test_a_server_that_is_not_there_is_given_up(connect, samples):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnavailableError, match=f"{url}: not available within 1 s"):
        connect(url, timeout_seconds=1).score(samples[0])


def test_an_answer_that_takes_too_long_is_given_up(server, connect, samples):
    server.troubles = [Trouble(503, delay_seconds=2)]
    started = time.perf_counter()
    with pytest.raises(ServerUnavailableError, match="ReadTimeout"):
        connect(server.url, timeout_seconds=0.3).score(samples[0])
    # Well before the answer; the rest is the room that a busy machine needs.
    assert time.perf_counter() - started < 1.5


def test_a_server_that_stays_full_is_given_up(server, connect, samples):
    server.troubles = [Trouble(429)] * 100
    with pytest.raises(ServerUnavailableError, match="429: the queue is full"):
        connect(server.url, timeout_seconds=1).score_many(samples[:1])


def test_the_key_opens_the_server_and_another_does_not(server, connect, samples):
    server.api_key = KEY
    assert connect(server.url, api_key=KEY).score(samples[0]).score > 0
    with pytest.raises(UnauthorizedError, match="is not the server's") as caught:
        connect(server.url, api_key="wrong").score(samples[0])
    assert KEY not in str(caught.value)
    assert "wrong" not in str(caught.value).replace("no or wrong key", "")
    with pytest.raises(UnauthorizedError, match="no API key was sent"):
        connect(server.url).score_many(samples)


@pytest.mark.parametrize("client_class", [ScoreClient, AsyncScoreClient])
def test_the_key_may_come_from_the_environment(server, client_class, samples, monkeypatch):
    server.api_key = KEY
    monkeypatch.setenv("SELECTMOE_API_KEY", KEY)

    async def score():
        async with AsyncScoreClient.from_environment(server.url) as client:
            return await client.score(samples[0])

    if client_class is AsyncScoreClient:
        assert asyncio.run(score()).score > 0
    else:
        with ScoreClient.from_environment(server.url) as client:
            assert client.score(samples[0]).score > 0


def test_what_is_no_score_server_is_named(server, connect, samples):
    with pytest.raises(ScoreRequestError, match="/elsewhere/score answered 404: <h1>Not Found"):
        connect(server.url + "/elsewhere").score(samples[0])


def test_the_async_client_has_several_requests_under_way(server, samples):
    server.max_samples = 4

    async def score():
        async with AsyncScoreClient(server.url, max_in_flight=3) as client:
            return await client.score_many(samples)

    results = asyncio.run(score())
    assert [result.sample_id for result in results] == [sample.sample_id for sample in samples]
    assert 1 < server.most_at_once <= 3


def test_the_first_failure_of_a_split_list_is_the_error_and_ends_the_rest(server, samples):
    server.max_samples = 4
    server.troubles = [Trouble(500, body=b'{"error": "no", "error_type": "internal"}')]

    async def score():
        async with AsyncScoreClient(server.url, max_in_flight=1) as client:
            await client.score_many(samples)

    with pytest.raises(ScoreRequestError, match="answered 500: no"):
        asyncio.run(score())
    assert len(scores_asked_for(server)) == 1


def test_threads_may_share_a_client(server, engine, samples):
    with ScoreClient(server.url) as client:
        found = [None] * 8

        def score(number):
            found[number] = client.score(samples[number]).score

        threads = [threading.Thread(target=score, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [engine.score([sample])[0].score for sample in samples[:8]]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("localhost:8000",), {}, "must begin with http:// or https://, got 'localhost:8000'"),
        ((), {"api_key": ""}, "api_key must be printable ASCII without blanks"),
        ((), {"api_key": "a\nb"}, "api_key must be printable ASCII without blanks"),
        ((), {"timeout_seconds": 0}, "timeout_seconds must be above 0"),
    ],
)
@pytest.mark.parametrize("client_class", [ScoreClient, AsyncScoreClient])
def test_a_mistake_is_named_when_the_client_is_made(client_class, arguments, settings, message):
    with pytest.raises(ConfigError, match=message):
        client_class(*arguments, **settings)


def test_without_httpx_only_the_client_is_missing_and_says_what_it_needs(repository):
    script = (
        "import sys; sys.modules['httpx'] = None\n"  # importing it now fails, as if not installed
        "import selectmoe, selectmoe.client\n"
        "try: selectmoe.client.ScoreClient()\n"
        "except selectmoe.SelectMoeError as error: print(error)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    assert "pip install 'selectmoe[client]'" in answer.stdout
