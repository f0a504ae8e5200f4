import datetime
import email.utils
import json
import math

import pytest

from selectmoe.client.requests import (
    Answer,
    EncodedBatch,
    NoAnswer,
    Request,
    ScoreDialogues,
    ScoreFailure,
    ScoreResult,
    TokenScore,
    Wait,
    encode_batches,
    parse_result,
    retry_after_seconds,
    retry_wait,
)
from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.errors import (
    ConfigError,
    DataError,
    ScoreRequestError,
    ServerUnavailableError,
    UnauthorizedError,
)
from selectmoe.records import Message, Sample

SAMPLE = Sample("d", "1", (Message("user", "Why?"), Message("assistant", "Därum. 🙂")))
GOOD = Answer(
    200,
    json.dumps(
        {"results": [{"id": "1", "score": 0.5, "num_tokens": 9, "num_answer_tokens": 4,
                      "truncated": False}]}
    ).encode(),
)  # fmt: skip
FULL = Answer(429, b'{"error": "the queue is full", "error_type": "overloaded"}')


class Clock:
    """Time that passes only where a dialogue waits or a request takes some."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def play(
    outcomes, *, timeout_seconds=60.0, has_key=False, seconds_a_request=0.0, sample_ids=("1",)
):
    """The result of a dialogue that gets `outcomes`, and its steps."""
    clock, steps, outcomes = Clock(), [], iter(outcomes)
    dialogues = ScoreDialogues(
        "http://server", has_key, timeout_seconds, clock=clock, draw=lambda: 0.5
    )
    dialogue = dialogues.score(EncodedBatch(b"{}", sample_ids))
    step = next(dialogue)
    try:
        while True:
            steps.append(step)
            if isinstance(step, Wait):
                clock.now += step.seconds
                step = dialogue.send(None)
            else:
                clock.now += seconds_a_request
                step = dialogue.send(next(outcomes))
    except StopIteration as end:
        return end.value, steps


def waits(steps):
    return [step.seconds for step in steps if isinstance(step, Wait)]


def test_a_full_queue_a_lost_connection_and_a_restart_are_outlived():
    troubles = [FULL, NoAnswer("ConnectError"), Answer(503, b""), Answer(502, b"<html>")]
    [result], steps = play([*troubles, GOOD])
    assert result.score == 0.5
    # Twice as long each time; the draw of 0.5 is three quarters of the way.
    assert waits(steps) == [0.75 * 0.25 * 2**tries for tries in range(4)]


def test_retry_after_is_never_undercut():
    answer = Answer(429, FULL.body, retry_after="7")
    _, steps = play([answer, GOOD])
    assert waits(steps) == [7 + 0.25 * 0.5]


def test_own_waits_stop_growing():
    assert retry_wait(10_000, None, 0.999) <= 20
    assert all(retry_wait(n, None, 0.0) <= retry_wait(n + 1, None, 0.0) for n in range(1, 40))


def test_the_draw_spreads_clients_over_half_of_the_wait():
    assert retry_wait(3, None, 0.0) == 0.5
    assert retry_wait(3, None, 0.999) == pytest.approx(1.0, abs=0.001)  # draws end below 1


def test_a_request_gives_up_where_its_time_ends_and_says_what_happened_last():
    with pytest.raises(ServerUnavailableError) as caught:
        play([FULL] * 1_000, timeout_seconds=10)
    line = str(caught.value)
    assert line.startswith("http://server: not available within 10 s (tries: ")
    assert line.endswith("429: the queue is full")
    assert caught.value.status == 429


def test_a_retry_after_beyond_the_time_left_is_not_waited_for():
    with pytest.raises(ServerUnavailableError):
        play([Answer(429, b"", retry_after="3600")], timeout_seconds=10)


def test_each_try_gets_only_the_time_that_is_left():
    _, steps = play([FULL, FULL, GOOD], timeout_seconds=10, seconds_a_request=2)
    limits = [step.timeout_seconds for step in steps if isinstance(step, Request)]
    assert limits == pytest.approx([10, 8 - 0.1875, 6 - 0.1875 - 0.375])


@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_another_try_cannot_mend_is_said_at_once(status):
    body = b'{"error": "samples[0]: no text", "error_type": "validation"}'
    with pytest.raises(ScoreRequestError, match=f"/score answered {status}: samples") as caught:
        play([Answer(status, body)])
    assert (caught.value.status, caught.value.error_type) == (status, "validation")


@pytest.mark.parametrize("status", [413, 422])
def test_a_sample_that_the_server_refuses_by_itself_is_its_failure(status):
    answer = Answer(status, b'{"error": "samples[0]: no text", "error_type": "validation"}')
    result, _ = play([answer])
    assert result == [ScoreFailure("1", "samples[0]: no text", "validation")]


def test_a_list_of_which_nothing_is_well_formed_fails_sample_by_sample():
    answer = Answer(422, b'{"error": "samples[0]: no text", "error_type": "validation"}')
    result, _ = play([answer], sample_ids=("a", None))
    assert [failure.sample_id for failure in result] == ["a", None]


def test_a_list_that_is_too_long_is_the_callers_mistake():
    answer = Answer(413, b'{"error": "too many", "error_type": "too_large"}')
    with pytest.raises(ScoreRequestError, match="answered 413: too many") as caught:
        play([answer], sample_ids=("a", "b"))
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize(
    ("has_key", "hint"), [(False, "no API key was sent"), (True, "is not the server's")]
)
def test_a_missing_and_a_wrong_key_are_told_apart(has_key, hint):
    with pytest.raises(UnauthorizedError, match=hint):
        play(
            [Answer(401, b'{"error": "wrong key", "error_type": "unauthorized"}')], has_key=has_key
        )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>hello</html>", "no JSON object: <html>hello"),
        (b"[]", "no JSON object"),
        (b"{}", "KeyError: 'results'"),
        (b'{"results": []}', "0 results for 1 samples"),
        (b'{"results": [{"id": "1"}]}', "KeyError: 'score'"),
        (b'{"results": [7]}', "TypeError"),
        (b'{"results": null}', "TypeError"),
    ],
)
def test_an_answer_without_scores_is_a_clear_error(body, reason):
    with pytest.raises(ScoreRequestError, match="not the answer of a score server") as caught:
        play([Answer(200, body)])
    assert reason in str(caught.value)


def test_a_result_has_what_its_detail_asked_for():
    entry = {
        "id": None, "score": 0.1, "percentile": 20.0, "num_tokens": 3,
        "num_answer_tokens": 1, "truncated": True, "layers": [0.5, -1],
        "tokens": [{"text": "Hi", "start": 0, "end": 2, "score": 0.25, "is_answer": False}],
    }  # fmt: skip
    result = parse_result(entry)
    assert result == ScoreResult(
        None, 0.1, 20.0, 3, 1, True, (0.5, -1.0), (TokenScore("Hi", 0, 2, 0.25, False),)
    )
    failure = parse_result({"id": "x", "error": "no", "error_type": "validation"})
    assert failure == ScoreFailure("x", "no", "validation")


def bodies(samples, **settings):
    return [json.loads(batch.body) for batch in encode_batches(samples, **settings)]


def test_a_sample_and_a_mapping_go_as_the_server_takes_them():
    [body] = bodies([SAMPLE, {"text": "Hi"}], detail="layers")
    assert body == {
        "detail": "layers",
        "samples": [
            {
                "id": "1",
                "messages": [
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "Därum. 🙂"},
                ],
            },
            {"text": "Hi"},
        ],
    }


def test_batching_is_named_only_where_it_is_not_the_usual():
    assert bodies([SAMPLE], batching="own")[0]["batching"] == "own"
    assert "batching" not in bodies([SAMPLE])[0]


def test_long_lists_are_split_by_number_and_keep_their_order():
    samples = [{"text": str(number)} for number in range(10)]
    split = bodies(samples, max_samples=4)
    assert [len(body["samples"]) for body in split] == [4, 4, 2]
    assert [sample for body in split for sample in body["samples"]] == samples
    assert bodies([], max_samples=4) == []


def test_long_lists_are_split_by_size_to_the_last_byte():
    samples = [{"text": "ü" * number} for number in range(60)]
    limit = 700
    batches = list(encode_batches(samples, max_body_bytes=limit))
    sizes = [len(batch.body) for batch in batches]
    assert max(sizes) <= limit
    # Each but the last is as full as it can be: the next sample would not have fitted.
    firsts = [json.loads(batch.body)["samples"][0] for batch in batches[1:]]
    separator = 1
    for size, first in zip(sizes, firsts, strict=False):
        assert size + separator + len(json.dumps(first, ensure_ascii=False).encode()) > limit
    assert sum(len(batch.sample_ids) for batch in batches) == 60


def test_a_sample_that_is_too_large_is_left_to_the_server_by_itself():
    split = bodies([{"text": "a"}, {"text": "b" * 500}, {"text": "c"}], max_body_bytes=200)
    assert [len(body["samples"]) for body in split] == [1, 1, 1]


def test_half_an_emoji_spoils_no_neighbour():
    [body] = bodies([{"text": "\ud83d"}, {"text": "🙂"}])
    assert body["samples"] == [{"text": "\ud83d"}, {"text": "🙂"}]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("text", r"samples\[0\] must be a mapping or a selectmoe.Sample, got str"),
        ({"text": math.nan}, r"samples\[0\] cannot be written as JSON"),
        ({"text": {1, 2}}, r"samples\[0\] cannot be written as JSON"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(sample, message):
    with pytest.raises(DataError, match=message):
        bodies([sample])


def test_retry_after_may_be_a_number_or_a_date():
    assert retry_after_seconds(Answer(429, b"", "12")) == 12
    assert retry_after_seconds(Answer(429, b"", None)) is None
    assert retry_after_seconds(Answer(429, b"", "soon")) is None
    assert retry_after_seconds(Answer(429, b"", "-3")) is None
    noon = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
    date = email.utils.format_datetime(noon, usegmt=True)
    for seconds_before, wait in [(90, 90), (-90, 0)]:
        now = noon.timestamp() - seconds_before
        assert retry_after_seconds(Answer(429, b"", date), lambda now=now: now) == wait


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_time_limit_is_a_number_above_0(seconds):
    with pytest.raises(ConfigError, match="timeout_seconds must be above 0"):
        ScoreDialogues("http://server", has_key=False, timeout_seconds=seconds)


def test_a_sample_is_sent_with_all_that_it_says():
    answer = Message("assistant", "Because.", '{"thinking": "Hm.", "weight": 1}')
    sample = Sample("d", "1", (Message("user", "Why?"), answer), tools='[{"name": "f"}]')
    [batch] = encode_batches([sample, {"id": 7, "text": "Because."}])
    sent, mapping = json.loads(batch.body)["samples"]
    read = parse_row(sent, RowLocation("x", 1, "d"))
    assert (read.messages, read.tools) == (sample.messages, sample.tools)
    assert mapping == {"id": 7, "text": "Because."}
    assert batch.sample_ids == ("1", "7")
