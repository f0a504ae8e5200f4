"""/openapi.json: built from the wire types, with examples that work as they stand."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

import selectmoe
from serve.error_responses import STATUS_BY_ERROR_TYPE, ErrorResponse
from serve.schemas import ScoreRequest, ScoreResponse

REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    401: "The key is missing or wrong.",
    404: "There is no such path.",
    405: "The path does not take this method.",
    413: "The body, or the list of samples, is too large.",
    422: "The request is not valid; the message names the field.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The service is not ready.",
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which to try again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    }
}
EXAMPLES = {
    "one sample": {
        "samples": {
            "prompt": "Why is the sky blue?",
            "response": "Air scatters blue light more than red light.",
        }
    },
    "a list": {
        "samples": [
            {
                "id": "a",
                "messages": [
                    {"role": "user", "content": "Name a prime number."},
                    {"role": "assistant", "content": "Seven is a prime number."},
                ],
            },
            {"id": "b", "text": "The quick brown fox jumps over the lazy dog."},
        ],
        "detail": "layers",
    },
    "every token": {
        "samples": {"prompt": "What is 2 + 2?", "response": "2 + 2 is 4."},
        "detail": "tokens",
    },
}


def openapi_document(*, needs_key: bool) -> dict[str, Any]:
    """Without a key no operation asks for one: what is documented is what this server does."""
    _, models = models_json_schema(
        [
            (ScoreRequest, "validation"),
            (ScoreResponse, "serialization"),
            (ErrorResponse, "serialization"),
        ],
        ref_template=REFERENCE,
    )
    components: dict[str, Any] = {"schemas": models["$defs"]}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Select-MoE",
            "version": selectmoe.__version__,
            "description": "Scores instruction-tuning samples with the quality gates of a "
            "Mixture-of-Experts model: higher is better to train on.",
        },
        "paths": {
            "/score": {"post": _secured(_score(), needs_key)},
            "/info": {"get": _secured(_report("What is served", _object(), [503]), needs_key)},
            "/metrics": {"get": _secured(_metrics(), needs_key)},
            "/health/live": {"get": _report("Whether the server runs", _status())},
            "/health/ready": {"get": _report("Whether every scorer answers", _status(), [503])},
        },
        "components": components,
    }


def _score() -> dict[str, Any]:
    return {
        "summary": "Score samples",
        "description": "One sample or a list. Results stand in the order of the samples; in a list "
        "a sample that has no score has an error instead. Only a list without one well-formed "
        "sample is refused as a whole.",
        "operationId": "score",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": REFERENCE.format(model="ScoreRequest")},
                    "examples": {name: {"value": value} for name, value in EXAMPLES.items()},
                }
            },
        },
        "responses": {
            "200": _content("The scores.", {"$ref": REFERENCE.format(model="ScoreResponse")}),
            **_errors([413, 422, 429, 500, 503]),
        },
    }


def _report(summary: str, schema: dict[str, Any], errors: Sequence[int] = ()) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": _content("The answer.", schema), **_errors([*errors, 500])},
    }


def _metrics() -> dict[str, Any]:
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "summary": "Numbers for Prometheus, summed over replicas",
        "responses": {"200": text, **_errors([500, 503])},
    }


def _secured(operation: dict[str, Any], needs_key: bool) -> dict[str, Any]:
    if not needs_key:
        return operation
    responses = {**operation["responses"], **_errors([401])}
    return {**operation, "responses": responses, "security": [{"key": []}]}


def _errors(statuses: Sequence[int]) -> dict[str, Any]:
    assert set(statuses) <= set(STATUS_BY_ERROR_TYPE.values())
    schema = {"$ref": REFERENCE.format(model="ErrorResponse")}
    answers = {}
    for status in statuses:
        answers[str(status)] = _content(MEANINGS[status], schema)
        if status in (429, 503):
            answers[str(status)]["headers"] = RETRY_AFTER
    return answers


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object() -> dict[str, Any]:
    return {"type": "object"}


def _status() -> dict[str, Any]:
    return {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
