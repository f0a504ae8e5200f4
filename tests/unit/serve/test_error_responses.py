"""Every error has one shape; the table has a status for each type."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException

from selectmoe.client.wire import STATUS_BY_ERROR_TYPE
from serve.error_responses import RequestError, WireResponse, on_http_error


@pytest.mark.parametrize(("error_type", "status"), STATUS_BY_ERROR_TYPE.items())
def test_a_type_has_its_status_and_the_body_its_two_fields(error_type, status):
    response = RequestError(error_type, "A sentence.").response()
    assert response.status_code == status
    assert json.loads(response.body) == {"error": "A sentence.", "error_type": error_type}
    assert response.headers["content-type"] == "application/json"


def test_a_full_queue_says_when_to_come_back():
    response = RequestError("overloaded", "full", retry_after_seconds=7).response()
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("status", [404, 405])
def test_what_the_framework_refuses_has_the_same_shape(status):
    error = HTTPException(status, headers={"Allow": "POST"})
    response = asyncio.run(on_http_error(None, error))
    assert response.status_code == status
    assert set(json.loads(response.body)) == {"error", "error_type"}
    assert response.headers["allow"] == "POST"


def test_half_of_an_emoji_survives_the_way_back():
    assert json.loads(WireResponse({"id": "\ud83d", "ü": "ü"}).body) == {"id": "\ud83d", "ü": "ü"}


def test_not_a_number_is_never_sent():
    with pytest.raises(ValueError, match="Out of range"):
        WireResponse({"score": float("nan")})
