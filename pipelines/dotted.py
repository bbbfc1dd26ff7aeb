"""Nested settings by dotted names, as `objective.lambda_nr`."""

from collections.abc import Iterator, Mapping
from typing import Any


def dotted_items(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of sections in one another with its name; an empty section is a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from dotted_items(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
