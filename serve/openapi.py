"""The parts of /openapi.json that FastAPI cannot infer: error responses, the body of /score."""

from typing import Any

from fastapi import FastAPI

from selectmoe.client.wire import STATUS_BY_ERROR_TYPE
from serve.schemas import ErrorResponse, ScoreRequest

REFERENCE = "#/components/schemas/{model}"
DESCRIPTIONS = {
    401: "The key is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body, or the list of samples, is too large.",
    415: "The body has a content coding that the server cannot decode; Accept-Encoding lists them.",
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
# /score parses its body itself, so that one invalid sample of a list leaves the others alone.
SCORE_REQUEST: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": REFERENCE.format(model="ScoreRequest")},
                "examples": {name: {"value": value} for name, value in EXAMPLES.items()},
            }
        },
    }
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with these errors."""
    assert set(statuses) <= set(STATUS_BY_ERROR_TYPE.values())
    # Not by FastAPI's "model", which documents the errors of /metrics as plain text.
    schema = {"$ref": REFERENCE.format(model="ErrorResponse")}
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "content": {"application/json": {"schema": schema}},
            **({"headers": RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def document_referenced_bodies(app: FastAPI) -> None:
    """Adds the schemas that the routes above refer to, but no signature of a route names."""
    schemas = app.openapi()["components"]["schemas"]
    for model in (ScoreRequest, ErrorResponse):
        schema = model.model_json_schema(ref_template=REFERENCE)
        schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
