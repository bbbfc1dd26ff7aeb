"""The rule for clips with several captions, as `sgmd prepare --captions` names it."""

from enum import StrEnum


class CaptionChoice(StrEnum):
    """Captions that are taken of a clip that has several."""

    FIRST = "first"
    ALL = "all"
    RANDOM = "random"
