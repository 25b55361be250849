"""How a part of the configuration refuses a value."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the field, its value and what would do."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name} must be > 0, got {value}")


def not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name} must be >= 0, got {value}")
