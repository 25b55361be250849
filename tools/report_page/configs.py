"""Resolved configurations, flattened and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

ABSENT = "absent"


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as YAML would show it) of every leaf; items of a list go by their name where they have one:
    `phases[text].steps`."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for at, item in enumerate(value):
            name = item.get("name", at) if isinstance(item, dict) else at
            yield from flat(item, f"{path}[{name}]")
    else:
        yield path, shown(value)


def shown(value: Any) -> str:
    """A leaf as text."""
    if isinstance(value, list):
        return ", ".join(map(shown, value)) if value else "[]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def differences(configs: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """(key, its value in each configuration) of the keys whose values are not all the same."""
    leaves = [dict(flat(config)) if config is not None else {} for config in configs]
    keys = dict.fromkeys(key for each in leaves for key in each)
    rows = [(key, [each.get(key, ABSENT) for each in leaves]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
