"""Raises ConfigError, with name, rule and value, for a setting out of range."""

from selectmoe.errors import ConfigError


def require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def require_at_least(minimum: int, settings: object, *names: str) -> None:
    """Each of the named settings is null or at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value >= minimum, name, f"at least {minimum}", value)


def require_model_of_revision(model: str | None, revision: str | None) -> None:
    if revision is not None and model is None:
        raise ConfigError(f"revision needs a model on the hub, got {revision!r} without a model")
