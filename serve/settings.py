"""The server's settings: one frozen dataclass, filled from SELECTMOE_* variables in one place."""

import ipaddress
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from selectmoe.config.checks import require
from selectmoe.errors import ConfigError
from selectmoe.paths import EMBEDDED_SELECTOR

PREFIX = "SELECTMOE_"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Each field `name` is set by the environment variable SELECTMOE_NAME."""

    api_key: str | None = field(default=None, repr=False)  # no log shows it
    """Bearer key that /score, /info and /metrics ask for; without one only a loopback address is
    served."""
    model: str = str(EMBEDDED_SELECTOR)
    """Select-MoE folder or hub name; default the embedded selector."""
    weights: str | None = None
    """Stage 1's gates or adapter: a weights file, or a folder that holds one."""
    revision: str | None = None
    """A name of yours for what is served, such as a tag; answers repeat it."""
    formula: str = "answer_margin"
    """Which tokens and layers a score averages, as in the select job."""
    max_sequence_length: int = 1_024
    """Tokens of a sample that are read; of a longer one, the first so many."""
    device: str | None = None
    """cpu or cuda; null is cuda for replicas with a share of a GPU, else cpu."""
    dtype: str | None = None
    """float32 or bfloat16; null is bfloat16 on a GPU and float32 on a CPU."""

    num_replicas: int = 1
    """Scorer replicas, each with its own copy of the model."""
    max_replicas: int | None = None
    """Autoscale the scorers from num_replicas to so many; null is no autoscaling."""
    num_ingress_replicas: int = 1
    """Processes that parse, tokenise and batch; each makes batches of its own."""
    num_cpus_per_replica: int = 1
    """CPUs that a scorer reserves, and without a GPU the threads that it computes on."""
    num_gpus_per_replica: float = 0.0
    """GPUs that a scorer reserves; 0.5 puts two on one GPU."""

    max_batch_tokens: int | None = None
    """Tokens of one call of a scorer, and of a forward pass with its padding; null is 4,096 on a
    CPU, and on a GPU what its free memory takes, at most 65,536."""
    max_wait_milliseconds: float = 5.0
    """How long a sample waits for company while every scorer is busy; an idle one gets it at
    once."""
    max_queued_samples: int = 2_048
    """Samples accepted and not yet answered, of one ingress replica; above, requests get 429."""
    max_samples_per_request: int = 512
    """Samples in one request; above, 413."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Bytes of one request; above, 413."""
    request_timeout_seconds: float = 60.0
    """After which a request gets 503, and its samples leave the queue."""
    stall_timeout_seconds: float = 30.0
    """After which a batch that is being scored counts as stuck and its replica is replaced."""

    def __post_init__(self) -> None:
        for name in (
            "max_sequence_length", "num_replicas", "num_ingress_replicas", "num_cpus_per_replica",
            "max_queued_samples", "max_samples_per_request", "max_body_bytes",
        ):  # fmt: skip
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("request_timeout_seconds", "stall_timeout_seconds"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        for name in ("num_gpus_per_replica", "max_wait_milliseconds"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        tokens, most = self.max_batch_tokens, self.max_replicas
        self._require(tokens is None or tokens >= 1, "max_batch_tokens", "at least 1")
        self._require(
            most is None or most >= self.num_replicas, "max_replicas", "at least num_replicas"
        )
        self._require(self.device in (None, "cpu", "cuda"), "device", "cpu or cuda")
        self._require(self.dtype in (None, "float32", "bfloat16"), "dtype", "float32 or bfloat16")
        if self.api_key is not None and not _fits_a_header(self.api_key):
            # Not through `require`, which would show it.
            raise ConfigError(
                f"{PREFIX}API_KEY must be printable ASCII, with no blank or line end in it"
            )

    def _require(self, condition: bool, name: str, rule: str) -> None:
        require(condition, PREFIX + name.upper(), rule, getattr(self, name))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ServeSettings":
        """Empty variables count as unset. Raises ConfigError, naming variable, rule and value."""
        hints = typing.get_type_hints(cls)
        given: dict[str, Any] = {
            setting.name: _parsed(PREFIX + setting.name.upper(), text, hints[setting.name])
            for setting in fields(cls)
            if (text := environment.get(PREFIX + setting.name.upper(), ""))
        }
        return cls(**given)

    @property
    def model_name(self) -> str:
        """What answers call the model: no folder of the server's is told."""
        if self.model == str(EMBEDDED_SELECTOR):
            return "embedded"
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model

    def require_key_for(self, host: str) -> None:
        """Raises ConfigError where `host` is reachable from other machines and no key is set."""
        if self.api_key is None and not is_loopback(host):
            raise ConfigError(
                f"{PREFIX}API_KEY must be set to serve on {host}, which other machines can reach; "
                "without a key only a loopback address such as 127.0.0.1 is served"
            )


def _fits_a_header(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key and key != ""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parsed(variable: str, text: str, hint: object) -> object:
    """The text as the first type of the hint: `int | None` is int."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if choices[0] is int or choices[0] is float:
        try:
            return choices[0](text)
        except ValueError:
            rule = "a whole number" if choices[0] is int else "a number"
            raise ConfigError(f"{variable} must be {rule}, got {text!r}") from None
    return text
