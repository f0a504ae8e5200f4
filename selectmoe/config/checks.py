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
