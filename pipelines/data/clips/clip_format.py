"""Format of decoded clips, and how a picture of another size is made to fit."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from fractions import Fraction

from sgmd_core.errors import ConfigError

_TIME_TOLERANCE_S = Fraction(1, 1000)
"""Containers such as WebM round time stamps to milliseconds."""


class FitPolicy(StrEnum):
    """Treatment of a picture whose size is not the wanted one.

    resize    each side is scaled by itself; the proportions change
    crop      scaled until it covers the wanted size, then what sticks out is cut off, equally on
              both sides
    refuse    the clip is bad
    """

    RESIZE = "resize"
    CROP = "crop"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class ClipFormat:
    """The wanted clip; None keeps what the file has.

    Attributes:
        num_frames: Frames, from the first one on; a shorter clip is bad.
        height: Pixels; given together with `width`.
        width: Pixels.
        fps: Frames a second.
        policy: What happens to pictures of another size.

    Raises:
        ConfigError: a number is not positive, or only one of height and width is given.
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    policy: FitPolicy = FitPolicy.CROP

    def __post_init__(self) -> None:
        numbers = {
            "num_frames": self.num_frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
        }
        wrong = {name: n for name, n in numbers.items() if n is not None and not 0 < n < math.inf}
        if wrong:
            raise ConfigError(
                "reading the wanted format of clips",
                ", ".join(f"{name} = {value}" for name, value in wrong.items()),
                "positive numbers",
            )
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                "reading the wanted format of clips",
                f"height = {self.height}, width = {self.width}",
                "both or neither",
            )

    @property
    def keeps_everything(self) -> bool:
        """True if nothing is asked of a clip."""
        return self.num_frames is None and self.height is None and self.fps is None


@dataclass(frozen=True, slots=True)
class ClipLimits:
    """Limits of one file; one that asks for more is bad.

    Attributes:
        max_pixels: Of one picture; 8192 x 4320 fit.
        max_frames: Frames that are decoded, and that come out.
        max_seconds: Length of what is decoded.
        max_decode_s: Time to decode one file.

    Raises:
        ConfigError: a number is not positive.
    """

    max_pixels: int = 40_000_000
    max_frames: int = 36_000
    max_seconds: float = 3600.0
    max_decode_s: float = 600.0

    def __post_init__(self) -> None:
        wrong = {name: n for name, n in asdict(self).items() if not 0 < n < math.inf}
        if wrong:
            raise ConfigError(
                "reading the bounds of clips",
                ", ".join(f"{name} = {value}" for name, value in wrong.items()),
                "positive numbers",
            )


DEFAULT_LIMITS = ClipLimits()


@dataclass(frozen=True, slots=True)
class FramePlacement:
    """Scaling of a picture, then the window of the wanted size that is cut out.

    Attributes:
        scaled_height: Pixels after scaling.
        scaled_width: Pixels after scaling.
        top: First row of the window.
        left: First column of the window.
    """

    scaled_height: int
    scaled_width: int
    top: int
    left: int


def place(
    height: int, width: int, wanted_height: int, wanted_width: int, *, pixel_aspect: float = 1.0
) -> FramePlacement:
    """Returns the centred window that covers the wanted size (policy `crop`).

    Args:
        height: Rows of the picture.
        width: Columns of the picture.
        wanted_height: Rows of the window.
        wanted_width: Columns of the window.
        pixel_aspect: Width of one stored pixel over its height.
    """
    shown_width = width * pixel_aspect
    scale = max(wanted_height / height, wanted_width / shown_width)
    scaled_height = max(wanted_height, round(height * scale))
    scaled_width = max(wanted_width, round(shown_width * scale))
    return FramePlacement(
        scaled_height,
        scaled_width,
        top=(scaled_height - wanted_height) // 2,
        left=(scaled_width - wanted_width) // 2,
    )


def samples_before(end_s: Fraction, fps: Fraction) -> int:
    """Counts the sampling times 0, 1/fps, 2/fps, ... before a time.

    A time that misses the end by a rounded time stamp counts as on it, that is, as not before it.
    """
    return max(0, math.ceil((end_s - _TIME_TOLERANCE_S) * fps))
