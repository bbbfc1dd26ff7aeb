"""Worlds whose truth is known: clips whose properties are read exactly from pixels."""

from enum import StrEnum


class WorldName(StrEnum):
    """Embedded worlds: captioned clips that are rendered here and read back from pixels."""

    SHAPES = "shapes"
    OPEN = "open"
