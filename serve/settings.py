"""The settings of the service: a frozen dataclass, filled from SELECTMOE_* variables."""

import ipaddress
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from selectmoe.client.wire import API_KEY_RULE, is_valid_api_key
from selectmoe.config.checks import require
from selectmoe.config.engine import EngineConfig
from selectmoe.errors import ConfigError
from selectmoe.paths import EMBEDDED_SELECTOR

PREFIX = "SELECTMOE_"
# Read by `python -m serve`: an application cannot choose the address of Serve's HTTP proxies.
ADDRESS_VARIABLES = (PREFIX + "HOST", PREFIX + "PORT")
RENAMED = {"WEIGHTS": "MODEL_CHECKPOINT_PATH", "MAX_BATCH_TOKENS": "MAX_TOKENS_PER_BATCH"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """The environment variable SELECTMOE_NAME sets the field `name`."""

    api_key: str | None = field(default=None, repr=False)  # no log shows it
    """Bearer key that /score, /info and /metrics require; without one, only a loopback address is
    served."""
    model: str = str(EMBEDDED_SELECTOR)
    """Selector: a Select-MoE folder or hub name, a selector folder, or a base that gates ship for;
    the embedded selector by default."""
    model_checkpoint_path: str | None = None
    """Stage 1's weights: the folder of its run, full_rank_weights.safetensors or an adapter; for a
    base the selector folder of its gates."""
    revision: str | None = None
    """Your name for what is served, such as a tag; responses repeat it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of the engine. Each of its fields has its own variable, such as SELECTMOE_FORMULA;
    max_tokens_per_batch also limits the tokens of one call of a scorer."""
    device: str | None = None
    """cpu or cuda; null is cuda for replicas with a share of a GPU, else cpu."""

    num_replicas: int = 1
    """Number of scorer replicas, each with its own copy of the model."""
    max_replicas: int | None = None
    """Autoscale the scorers between num_replicas and this number; null turns autoscaling off."""
    num_ingress_replicas: int = 1
    """Number of processes that parse, tokenize and batch; each has its own queue."""
    num_cpus_per_replica: int = 1
    """CPUs that a scorer reserves, and its number of threads when it has no GPU."""
    num_gpus_per_replica: float = 0.0
    """GPUs that a scorer reserves; 0.5 puts two scorers on one GPU."""

    max_wait_milliseconds: float = 5.0
    """How long a sample waits for others while every scorer is busy; an idle scorer gets it at
    once."""
    max_queued_samples: int = 2_048
    """Maximum samples accepted and not yet answered, per ingress replica; above it, requests get
    429."""
    max_samples_per_request: int = 512
    """Maximum samples per request; above it, 413."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Maximum bytes per request; above it, 413."""
    request_timeout_seconds: float = 60.0
    """Time after which a request gets 503, and its samples leave the queue."""
    stall_timeout_seconds: float = 30.0
    """Time after which a batch counts as stuck and its replica is replaced."""

    def __post_init__(self) -> None:
        for name in (
            "num_replicas", "num_ingress_replicas", "num_cpus_per_replica",
            "max_queued_samples", "max_samples_per_request", "max_body_bytes",
        ):  # fmt: skip
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("request_timeout_seconds", "stall_timeout_seconds"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        for name in ("num_gpus_per_replica", "max_wait_milliseconds"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        most = self.max_replicas
        self._require(
            most is None or most >= self.num_replicas, "max_replicas", "at least num_replicas"
        )
        self._require(self.device in (None, "cpu", "cuda"), "device", "cpu or cuda")
        if self.api_key is not None and not is_valid_api_key(self.api_key):
            # Not through `require`, which would show the key.
            raise ConfigError(f"{PREFIX}API_KEY must be {API_KEY_RULE}")

    def _require(self, condition: bool, name: str, rule: str) -> None:
        require(condition, PREFIX + name.upper(), rule, getattr(self, name))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ServeSettings":
        """Empty variables count as unset. Raises ConfigError with variable, rule and value."""
        for old, new in RENAMED.items():
            if environment.get(PREFIX + old):
                raise ConfigError(f"{PREFIX}{old} is now called {PREFIX}{new}; set that instead")
        if environment.get(PREFIX + "SIGNALS"):
            raise ConfigError(
                f"{PREFIX}SIGNALS cannot be set, got {environment[PREFIX + 'SIGNALS']!r}: the "
                "service gives scores alone"
            )
        try:
            engine = EngineConfig(**_given(EngineConfig, environment))
        except ConfigError as error:  # begins with the field's name, or with the variable's
            name, _, rule = str(error).removeprefix(PREFIX).partition(" ")
            raise ConfigError(f"{PREFIX}{name.upper()} {rule}") from error
        return cls(engine=engine, **_given(cls, environment))

    @property
    def model_name(self) -> str:
        """The model's name in responses, which reveals no path of the server."""
        if self.model == str(EMBEDDED_SELECTOR):
            return "embedded"
        path = Path(self.model)
        return path.resolve().name if path.exists() else self.model

    def require_key_for(self, host: str) -> None:
        """Raises ConfigError if other machines can reach `host` and no key is set."""
        if self.api_key is None and not is_loopback(host):
            raise ConfigError(
                f"{PREFIX}API_KEY must be set to serve on {host}, which other machines can reach; "
                "without a key only a loopback address such as 127.0.0.1 is served"
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _given(config_class: type, environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a dataclass that have a variable."""
    hints = typing.get_type_hints(config_class)
    return {
        setting.name: _parsed(PREFIX + setting.name.upper(), text, hints[setting.name])
        for setting in fields(config_class)
        if not is_dataclass(hints[setting.name])
        and (text := environment.get(PREFIX + setting.name.upper(), ""))
    }


def _parsed(variable: str, text: str, hint: object) -> object:
    """Converts the text to the first type of the hint: int for `int | None`."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if choices[0] is int or choices[0] is float:
        try:
            return choices[0](text)
        except ValueError:
            rule = "a whole number" if choices[0] is int else "a number"
            raise ConfigError(f"{variable} must be {rule}, got {text!r}") from None
    return text
