"""Clips out of encoded video bytes: frames by time, upright, in the wanted size.

    bytes -> decoded frames -> the frame shown at k / fps -> scaled -> upright -> cut -> pixels

A frame is shown from its time stamp until the next frame's, so files of a variable rate and of
other rates than the wanted one come out right. Frames stream: of a long video only what is wanted
is converted, and decoding stops at the last wanted frame. Sound is ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from pipelines.data.clips.clip_colour import look_of, matrix_of
from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.clip_format import (
    DEFAULT_LIMITS,
    ClipFormat,
    ClipLimits,
    FitPolicy,
    FramePlacement,
    place,
    samples_before,
)
from pipelines.data.clips.clip_stream import fraction, opened, shown_frames, stated_fps
from pipelines.media.video import Pixels

_STEADY_SHARE = 0.1
_STEADY_S = 0.002
_HEADER_TOLERANCE = Fraction(1, 100)


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Content of a video file.

    Attributes:
        height: Rows of a picture that stands upright.
        width: Columns of a picture that stands upright.
        num_frames: Frames.
        duration_s: From the first frame to the end of the last one.
        fps: Frames a second, on average.
        is_steady: Whether all frames are shown equally long, up to a tenth or two milliseconds.
        codec: Name of the video codec.
        has_audio: Whether there is sound.
        look: What changes its look, see `look_of`.
    """

    height: int
    width: int
    num_frames: int
    duration_s: float
    fps: float
    is_steady: bool
    codec: str
    has_audio: bool
    look: tuple[str, ...] = ()


def decode_clip(data: bytes, wanted: ClipFormat, limits: ClipLimits = DEFAULT_LIMITS) -> Pixels:
    """Decodes the wanted clip.

    Args:
        data: A file that FFmpeg can read.
        wanted: Frames, size and rate; None keeps what the file has.
        limits: What the file may ask for.

    Returns:
        Pixels (frames, height, width, 3), RGB.

    Raises:
        ClipError: the bytes do not hold such a clip; says why.
    """
    frames = sample_frames(data, wanted, limits)
    if wanted.num_frames is None:
        return np.stack(list(frames))
    # One by one into their place: a picture that is still in the cache is copied for nothing.
    first = next(frames)
    clip = np.empty((wanted.num_frames, *first.shape), dtype=np.uint8)
    for number, pixels in enumerate(chain([first], frames)):
        clip[number] = pixels
    return clip


def decode_video(data: bytes) -> Pixels:
    """Every frame of a file as it is, see `decode_clip`."""
    return decode_clip(data, ClipFormat())


def first_frame(data: bytes) -> Pixels:
    """The first picture (height, width, 3) of a file; the others are not decoded."""
    return decode_clip(data, ClipFormat(num_frames=1))[0]


@dataclass(frozen=True, slots=True)
class ClipDecoder:
    """Decodes files to clips of one format; what `Source.decode` is for videos.

    Attributes:
        wanted: Frames, size and rate; its policy says what happens to other sizes.
        limits: What a file may ask for.
    """

    wanted: ClipFormat
    limits: ClipLimits = field(default_factory=ClipLimits)

    def __call__(self, data: bytes, fps: float = 0.0) -> Pixels:
        """Pixels of one file, see `decode_clip`; the file knows its own rate better than `fps`."""
        return decode_clip(data, self.wanted, self.limits)


def sample_frames(
    data: bytes, wanted: ClipFormat, limits: ClipLimits = DEFAULT_LIMITS
) -> Iterator[Pixels]:
    """The frames of `decode_clip`, one (height, width, 3) after the other.

    Raises:
        ClipError: on the way, or at the end where frames are missing.
    """
    fps = None if wanted.fps is None else Fraction(wanted.fps)
    taken, end_s = 0, Fraction(0)
    with opened(data, limits, whole=wanted.num_frames is None) as (container, stream):
        fit = _Fitter(wanted, fraction(stream.sample_aspect_ratio) or Fraction(1))
        for shown in shown_frames(container, stream, limits):
            end_s = shown.end_s
            due = taken + 1 if fps is None else samples_before(end_s, fps)
            due = due if wanted.num_frames is None else min(due, wanted.num_frames)
            if due > limits.max_frames:
                raise ClipError(
                    ClipFault.TOO_MANY_FRAMES,
                    f"{due} frames" + (f" at {wanted.fps:g} fps" if wanted.fps else ""),
                    f"at most {limits.max_frames} (max_frames, --max-frames)",
                )
            if due > taken:
                pixels = fit(shown.image)
                yield from [pixels] * (due - taken)
                taken = due
            if taken == wanted.num_frames:
                return
    if taken == 0 or wanted.num_frames is not None:
        raise ClipError(
            ClipFault.TOO_SHORT,
            f"{float(end_s):.3f} s of video, enough for {taken} frames",
            f"{wanted.num_frames or 1} frames" + (f" at {wanted.fps:g} fps" if wanted.fps else ""),
        )


def read_facts(data: bytes, limits: ClipLimits = DEFAULT_LIMITS) -> ClipFacts:
    """Decodes a whole video, keeping no picture.

    Raises:
        ClipError: the bytes are not a video, hold no frame, or a frame cannot be decoded.
    """
    starts_s: list[float] = []
    size, end_s, look = (0, 0), Fraction(0), ()
    with opened(data, limits, whole=True) as (container, stream):
        for shown in shown_frames(container, stream, limits):
            look = look if starts_s else look_of(stream, shown.image)
            starts_s.append(float(shown.start_s))
            size, end_s = _upright_size(shown.image), shown.end_s
        height, width = size
        return ClipFacts(
            height=height,
            width=width,
            num_frames=len(starts_s),
            duration_s=float(end_s),
            fps=float(_fps(stated_fps(stream), len(starts_s) / end_s)),
            is_steady=_is_steady(starts_s),
            codec=stream.codec_context.name,
            has_audio=bool(container.streams.audio),
            look=look,
        )


def _fps(stated: Fraction, counted: Fraction) -> Fraction:
    """The header's rate where the frames confirm it: time stamps may be rounded."""
    return stated if abs(stated - counted) < _HEADER_TOLERANCE * counted else counted


def _is_steady(starts_s: list[float]) -> bool:
    gaps = np.diff(starts_s)
    return not len(gaps) or np.ptp(gaps) <= max(_STEADY_SHARE * gaps.max(), _STEADY_S)


def read_look(data: bytes, limits: ClipLimits = DEFAULT_LIMITS) -> tuple[str, ...]:
    """Properties that change the look of a clip, see `look_of`.

    Raises:
        ClipError: the first frame cannot be decoded.
    """
    with opened(data, limits, whole=False) as (container, stream):
        return look_of(stream, next(shown_frames(container, stream, limits)).image)


def read_first_frame(
    data: bytes, limits: ClipLimits = DEFAULT_LIMITS, *, whole: bool = True
) -> ClipFacts:
    """Decodes one frame and believes the file's header about the rest.

    Args:
        data: A file that FFmpeg can read.
        limits: What it may ask for.
        whole: All of it is wanted: refuse a header that states too many frames or seconds.

    Raises:
        ClipError: the bytes are not a video, or the first frame cannot be decoded.
    """
    with opened(data, limits, whole=whole) as (container, stream):
        shown = next(shown_frames(container, stream, limits))
        height, width = _upright_size(shown.image)
        fps = stated_fps(stream)
        duration_s = Fraction(container.duration or 0, av.time_base)
        num_frames = stream.frames or max(1, round(duration_s * fps))
        return ClipFacts(
            height=height,
            width=width,
            num_frames=num_frames,
            duration_s=float(num_frames / fps),
            fps=float(fps),
            is_steady=True,
            codec=stream.codec_context.name,
            has_audio=bool(container.streams.audio),
            look=look_of(stream, shown.image),
        )


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Returns the quarter turns, against the clock, that put a picture upright."""
    return round(frame.rotation / 90) % 4


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    turned = _quarter_turns(frame) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


class _Fitter:
    """Makes pixels of the wanted size out of decoded frames.

    One converter serves all frames of a clip, and one placement all of one size: the tables of the
    former and the arithmetic of the latter cost as much as a small picture.

    Args:
        wanted: Size and policy.
        pixel_aspect: Width of one stored pixel over its height.
    """

    def __init__(self, wanted: ClipFormat, pixel_aspect: Fraction) -> None:
        self._wanted = wanted
        self._pixel_aspect = pixel_aspect
        self._converter = VideoReformatter()
        self._first_size: tuple[int, int] | None = None
        self._spots: dict[tuple[int, int, int], FramePlacement] = {}

    def __call__(self, frame: av.VideoFrame) -> Pixels:
        """Pixels (height, width, 3) of one frame.

        Raises:
            ClipError: it has another size, and the policy is to refuse; or it has another size than
                the frames before, and none is wanted.
        """
        turns = _quarter_turns(frame)
        shape = (frame.height, frame.width, turns)
        spot = self._spots.get(shape)
        if spot is None:
            spot = self._spots[shape] = self._placement(frame, turns)
        # Scaling comes before turning: it leaves fewer pixels to turn. Waking other threads for it
        # takes longer than a small picture, and cores have clips of their own to decode.
        rows, columns = spot.scaled_height, spot.scaled_width
        if turns % 2:
            rows, columns = columns, rows
        scaled = self._converter.reformat(
            frame,
            width=columns,
            height=rows,
            format="rgb24",
            src_colorspace=matrix_of(frame),
            interpolation="BICUBIC",
            threads=1,
        )
        pixels = np.rot90(scaled.to_ndarray(), turns)
        bottom = spot.top + (self._wanted.height or spot.scaled_height)
        right = spot.left + (self._wanted.width or spot.scaled_width)
        return np.ascontiguousarray(pixels[spot.top : bottom, spot.left : right], dtype=np.uint8)

    def _placement(self, frame: av.VideoFrame, turns: int) -> FramePlacement:
        height, width = size = _upright_size(frame)
        self._first_size = self._first_size or size
        if self._wanted.height is None or self._wanted.width is None:
            _require_size(size, self._first_size)
            return FramePlacement(height, width, top=0, left=0)
        wanted = (self._wanted.height, self._wanted.width)
        match self._wanted.policy:
            case FitPolicy.REFUSE:
                _require_size(size, wanted)
                return FramePlacement(height, width, top=0, left=0)
            case FitPolicy.RESIZE:
                return FramePlacement(*wanted, top=0, left=0)
            case FitPolicy.CROP:
                aspect = 1 / self._pixel_aspect if turns % 2 else self._pixel_aspect
                return place(height, width, *wanted, pixel_aspect=float(aspect))


def _require_size(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    if size != wanted:
        raise ClipError(
            ClipFault.WRONG_SIZE,
            f"a picture of {size[0]}x{size[1]} (height x width)",
            f"{wanted[0]}x{wanted[1]}",
        )
