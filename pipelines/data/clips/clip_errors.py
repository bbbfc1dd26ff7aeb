"""Reasons why encoded bytes do not hold the wanted clip."""

from enum import StrEnum

from sgmd_core.errors import DataError


class ClipFault(StrEnum):
    """Reasons why a clip is bad."""

    UNDECODABLE = "undecodable"
    NO_FRAMES = "no_frames"
    TOO_SHORT = "too_short"
    WRONG_SIZE = "wrong_size"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_FRAMES = "too_many_frames"
    TOO_LONG = "too_long"
    TOO_SLOW = "too_slow"


class ClipError(DataError):
    """Encoded bytes do not hold the wanted clip.

    Args:
        fault: One of `ClipFault`.
        found: What the bytes hold.
        expected: What would have been right.
    """

    def __init__(self, fault: str, found: str, expected: str = "") -> None:
        super().__init__("decoding a video", found, expected)
        self.args = (fault, found, expected)
        self.fault = fault

    @property
    def in_short(self) -> str:
        """Returns what was found, and what was expected."""
        return f"{self.found}; expected {self.expected}" if self.expected else self.found
