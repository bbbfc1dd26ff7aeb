"""Accepts the old names of recipe keys, with a warning that states the new one."""

import logging
from collections.abc import Mapping
from typing import Any

from sgmd_core.errors import ConfigError

_log = logging.getLogger(__name__)

RENAMED_KEYS = {"topology.window": "topology.depth"}
"""New names of dotted keys by their old ones; a key stays in its section."""


def current_key(key: tuple[str, ...], *, warns: bool = True) -> tuple[str, ...]:
    """Returns the key under its present name, and warns where that is another one."""
    new = RENAMED_KEYS.get(".".join(key))
    if new is None:
        return key
    if warns:
        _log.warning("%s is now called %s: write that", ".".join(key), new)
    return tuple(new.split("."))


def with_current_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings with every old key under its present name.

    Args:
        settings: Settings of a recipe; left unchanged.

    Raises:
        ConfigError: A setting is given under both names.
    """
    result = dict(settings)
    for old, new in RENAMED_KEYS.items():
        *path, name = old.split(".")
        parent = result
        for part in path:
            inner = parent.get(part)
            if not isinstance(inner, Mapping):
                break
            parent[part] = dict(inner)
            parent = parent[part]
        else:
            if name in parent:
                present = current_key((*path, name))[-1]
                if present in parent:
                    raise ConfigError(
                        "reading the settings",
                        f"{old} and {new}, which are two names of one setting",
                        f"{new} alone",
                    )
                parent[present] = parent.pop(name)
    return result
