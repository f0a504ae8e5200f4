"""The Ray Serve application: `serve run serve.app:app` from the root of the repository.

Its settings are SELECTMOE_* environment variables, listed in settings.py; serve.yaml is the
configuration for production. `python -m serve` starts the same application on another address.
"""

import os
import sys

from ray.serve.exceptions import RayServeException

from selectmoe.errors import ConfigError
from serve.application import build
from serve.deployments import served_host
from serve.local_ray import is_serve_run, prepare_local_ray
from serve.settings import ADDRESS_VARIABLES, ServeSettings


def load_settings() -> ServeSettings:
    """An invalid setting is reported in one line, by `serve run` or in `serve status`."""
    try:
        settings = ServeSettings.from_environment()
        settings.require_key_for(served_host())
        given = [name for name in ADDRESS_VARIABLES if os.environ.get(name)]
        if given and is_serve_run():
            raise ConfigError(f"{given[0]} has no effect on `serve run`; start `python -m serve`")
    except ConfigError as error:
        if is_serve_run():
            sys.exit(f"error: {error}")
        # Serve reports every other exception with its traceback.
        raise RayServeException(str(error)) from error
    return settings


prepare_local_ray()
app = build(load_settings())
