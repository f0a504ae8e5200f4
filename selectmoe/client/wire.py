"""Constants shared by the score server and its clients: field values, statuses, API key rule.

The bodies of requests and responses are pydantic models in serve/schemas.py.
"""

from typing import Literal, TypeAlias

Detail: TypeAlias = Literal["sample", "layers", "tokens"]
Batching: TypeAlias = Literal["shared", "own"]
SampleErrorType: TypeAlias = Literal["validation", "internal"]

STATUS_BY_ERROR_TYPE = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "too_large": 413,
    "unsupported_encoding": 415,
    "validation": 422,
    "overloaded": 429,
    "internal": 500,
    "unavailable": 503,
}
# A body that arrived too slowly, a full queue, and a server that starts or stops; 502 and 504 come
# from a proxy in front of it.
RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})

API_KEY_RULE = "printable ASCII without blanks, and not empty"


def is_valid_api_key(api_key: str) -> bool:
    """Whether an HTTP header can carry the key."""
    return api_key != "" and api_key.isascii() and api_key.isprintable() and " " not in api_key
