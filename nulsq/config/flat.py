"""Settings as dotted keys."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a dataclass or mapping and of those in it."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(before: Any, now: Any, free: Collection[str] = ()) -> list[str]:
    """"KEY OLD -> NEW" for each dotted key in which two dataclasses differ, except the keys in `free`."""
    old, new = flatten(before), flatten(now)
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted(old.keys() | new.keys())
            if key not in free and old.get(key) != new.get(key)]
