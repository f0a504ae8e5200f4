"""Values of tables and of Python objects have one form in JSON, or an error."""

import datetime
import decimal
import json

import numpy as np
import pytest

from selectmoe.data.json_text import NoJsonError, json_text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"a": [1, 2.5, True, None, "é"]}, {"a": [1, 2.5, True, None, "é"]}),
        ([float("nan"), float("-inf"), np.float32(0.5)], [None, None, 0.5]),
        (np.array([[1, 2]]), [[1, 2]]),
        ((1, 2), [1, 2]),
        (datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC), "2026-01-31T12:00:00+00:00"),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        (datetime.timedelta(seconds=90), 90.0),
        (decimal.Decimal("1.50"), "1.50"),
        (b"\xff\x00", "/wA="),
        ({7: "a"}, {"7": "a"}),
    ],
)
def test_each_type_has_one_form(value, written):
    assert json.loads(json_text({"column": value})) == {"column": written}


def test_text_stays_as_it_is_and_a_lone_surrogate_becomes_an_escape():
    assert json_text({"a": "日"}) == '{"a": "日"}'
    assert json_text({"a": "日\ud83d"}) == '{"a": "\\u65e5\\ud83d"}'


def test_what_has_no_form_is_an_error():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), {1, 2}, deep, 10**5_000):
        with pytest.raises(NoJsonError):
            json_text([value])
