"""The token of a Ray cluster, decided before Ray connects to it or starts one.

Ray enables tokens for a driver as soon as ~/.ray/auth_token exists. On a cluster that was started
before that file was written, its workers know no token: they cannot answer the driver, and all its
actors end with "The actor never ran". So no command of ours writes the file, and none uses a token
on a cluster that has none. This module needs no Ray.
"""

import logging
import os
import secrets
from pathlib import Path

from selectmoe.errors import SelectMoeError

PING_TIMEOUT_SECONDS = 5.0
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_FILE = ".ray/auth_token"  # in the home folder

logger = logging.getLogger(__name__)


class ClusterTokenError(SelectMoeError, RuntimeError):
    """The environment demands a token that the Ray cluster does not have."""


def use_own_token() -> None:
    """Call before a local Ray starts: secures it by a token in the environment, without a file.

    Ray would write the file, and from then on demand the token of every cluster on this machine.
    """
    given = any(name in os.environ for name in ("RAY_AUTH_MODE", *TOKEN_VARIABLES))
    if not given and not (Path.home() / TOKEN_FILE).exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def match_auth_mode(address: str) -> None:
    """Call before Ray connects: uses no token on a cluster that has none, and says so.

    Raises ClusterTokenError if the environment demands a token all the same.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    sources = [name for name in TOKEN_VARIABLES if os.environ.get(name)]
    if (Path.home() / TOKEN_FILE).exists():
        sources.append(f"~/{TOKEN_FILE}")
    if mode == "disabled" or not (mode or sources) or not answers_without_token(address):
        return
    if mode is not None:
        raise ClusterTokenError(
            f"the Ray cluster at {address} was started without a token, and RAY_AUTH_MODE is "
            f"{mode!r}; set RAY_AUTH_MODE=disabled, or restart the cluster with the token"
        )
    logger.warning(
        "the Ray cluster at %s was started without a token; %s is not used", address, sources[0]
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"


def answers_without_token(address: str) -> bool:
    """Whether the cluster's control service (GCS) answers a request without a token."""
    import grpc  # with Ray; only here, since it takes a tenth of a second

    with grpc.insecure_channel(address) as channel:
        ping = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/CheckAlive",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        try:
            ping(b"", timeout=PING_TIMEOUT_SECONDS)
        except grpc.RpcError:  # it needs a token, or TLS, or is no control service
            return False
    return True
