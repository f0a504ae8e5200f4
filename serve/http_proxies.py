"""Sets up the HTTP proxies of Ray Serve, which have no settings for what this module changes.

A proxy is an actor of Serve with a uvicorn server. Variables in the environment of the cluster
reach it only where we start Ray; `serve run serve.yaml` and `serve deploy` start or find proxies of
their own. So each ingress replica sets up every proxy before it is ready, and later the proxies of
nodes that have joined. Connections opened before that keep the protocol that they have.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

CHECKOUT = str(Path(__file__).resolve().parents[1])
PROXY_NAME = "SERVE_PROXY_ACTOR"  # followed by the id of its node
NAMESPACE = "serve"
SET_UP_TIMEOUT_SECONDS = 10.0
SET_UP_AGAIN_SECONDS = 5.0

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def proxies_set_up() -> AsyncIterator[None]:
    """Every proxy is set up when this context is entered; new ones follow inside it."""
    finished: set[Any] = set()
    await _set_up_proxies(finished)
    task = asyncio.create_task(_keep_set_up(finished))
    try:
        yield
    finally:
        task.cancel()


async def _keep_set_up(finished: set[Any]) -> None:
    while True:
        await asyncio.sleep(SET_UP_AGAIN_SECONDS)
        await _set_up_proxies(finished)


async def _set_up_proxies(finished: set[Any]) -> None:
    """Sets up the proxies that are not in `finished`, and adds them to it."""
    try:
        for proxy in await asyncio.to_thread(_proxies):
            if proxy not in finished:
                call = proxy.__ray_call__.remote(_set_up_function(), CHECKOUT)
                await asyncio.wait_for(call, SET_UP_TIMEOUT_SECONDS)
                finished.add(proxy)
    except (RayError, TimeoutError, ValueError) as error:  # ValueError: a proxy that just ended
        logger.warning("an HTTP proxy is not set up yet: %s", type(error).__name__)


def _proxies() -> list[Any]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [
        ray.get_actor(actor["name"], namespace=NAMESPACE)
        for actor in actors
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PROXY_NAME)
    ]


def _set_up_function() -> Callable[[Any, str], None]:
    """A nested function, which is pickled by value: a proxy may not find `serve` by itself."""

    def set_up(proxy: Any, checkout: str) -> None:  # noqa: ANN401 (an actor of Serve)
        if checkout not in sys.path:
            sys.path.append(checkout)
        from serve.http_proxies import set_up_server

        _, server = proxy._start_http_server_task.result()
        set_up_server(server)

    return set_up


def set_up_server(server: Any) -> None:  # noqa: ANN401 (uvicorn.Server)
    """New connections of this uvicorn server use our protocol, and get JSON errors."""
    from serve.http_protocol import HttpProtocol
    from serve.proxy_errors import JsonErrorMiddleware

    config = server.config
    if config.http_protocol_class is not HttpProtocol:
        config.http_protocol_class = HttpProtocol
        config.loaded_app = JsonErrorMiddleware(config.loaded_app)
