"""Clips out of encoded video bytes: frames by time, upright, in the wanted size.

    bytes -> decoded frames -> the frame shown at k / fps -> scaled -> upright -> cut -> pixels

A frame is shown from its time stamp until the next frame's, so files of a variable rate and of
other rates than the wanted one come out right. Frames stream: of a long video only what is wanted
is converted, and decoding stops at the last wanted frame. Sound is ignored.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipelines.data.clips.clip_format import ClipFormat, FitPolicy, Placement, place, samples_before
from pipelines.media.video import Pixels
from sgmd_core.errors import DataError

_FALLBACK_FPS = Fraction(25)
_MAX_DURATION_S = 24 * 3600
_STEADY_SHARE = 0.1
_STEADY_S = 0.002
_HEADER_TOLERANCE = Fraction(1, 100)


class ClipFault(StrEnum):
    """Why a clip is bad."""

    UNDECODABLE = "undecodable"
    NO_FRAMES = "no_frames"
    TOO_SHORT = "too_short"
    WRONG_SIZE = "wrong_size"


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
        """What was found, and what would have been right."""
        return f"{self.found}; expected {self.expected}" if self.expected else self.found


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """What a video file holds.

    Attributes:
        height: Rows of a picture that stands upright.
        width: Columns of a picture that stands upright.
        num_frames: Frames.
        duration_s: From the first frame to the end of the last one.
        fps: Frames a second, on average.
        is_steady: Whether all frames are shown equally long, up to a tenth or two milliseconds.
        codec: Name of the video codec.
        has_audio: Whether there is sound.
    """

    height: int
    width: int
    num_frames: int
    duration_s: float
    fps: float
    is_steady: bool
    codec: str
    has_audio: bool


@dataclass(frozen=True, slots=True)
class _ShownFrame:
    """A frame and the time during which it is shown; the first one starts at 0."""

    image: av.VideoFrame
    start_s: Fraction
    end_s: Fraction


def decode_clip(data: bytes, wanted: ClipFormat) -> Pixels:
    """Decodes the wanted clip.

    Args:
        data: A file that FFmpeg can read.
        wanted: Frames, size and rate; None keeps what the file has.

    Returns:
        Pixels (frames, height, width, 3), RGB.

    Raises:
        ClipError: the bytes do not hold such a clip; says why.
    """
    frames = sample_frames(data, wanted)
    if wanted.num_frames is None:
        return np.stack(list(frames))
    # One by one into their place: a picture that is still in the cache is copied for nothing.
    first = next(frames)
    clip = np.empty((wanted.num_frames, *first.shape), dtype=np.uint8)
    for number, pixels in enumerate(chain([first], frames)):
        clip[number] = pixels
    return clip


def sample_frames(data: bytes, wanted: ClipFormat) -> Iterator[Pixels]:
    """The frames of `decode_clip`, one (height, width, 3) after the other.

    Raises:
        ClipError: on the way, or at the end where frames are missing.
    """
    fps = None if wanted.fps is None else Fraction(wanted.fps)
    taken, end_s = 0, Fraction(0)
    with _opened(data) as (container, stream):
        fit = _Fitter(wanted, _fraction(stream.sample_aspect_ratio) or Fraction(1))
        for shown in _shown_frames(container, stream):
            end_s = shown.end_s
            due = taken + 1 if fps is None else samples_before(end_s, fps)
            due = due if wanted.num_frames is None else min(due, wanted.num_frames)
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


def read_facts(data: bytes) -> ClipFacts:
    """Decodes a whole video, keeping no picture.

    Raises:
        ClipError: the bytes are no video, hold no frame, or a frame cannot be decoded.
    """
    starts_s: list[float] = []
    size, end_s = (0, 0), Fraction(0)
    with _opened(data) as (container, stream):
        for shown in _shown_frames(container, stream):
            starts_s.append(float(shown.start_s))
            size, end_s = _upright_size(shown.image), shown.end_s
        height, width = size
        return ClipFacts(
            height=height,
            width=width,
            num_frames=len(starts_s),
            duration_s=float(end_s),
            fps=float(_fps(_stated_fps(stream), len(starts_s) / end_s)),
            is_steady=_is_steady(starts_s),
            codec=stream.codec_context.name,
            has_audio=bool(container.streams.audio),
        )


def _fps(stated: Fraction, counted: Fraction) -> Fraction:
    """The header's rate where the frames bear it out: time stamps may be rounded."""
    return stated if abs(stated - counted) < _HEADER_TOLERANCE * counted else counted


def _is_steady(starts_s: list[float]) -> bool:
    gaps = np.diff(starts_s)
    return not len(gaps) or np.ptp(gaps) <= max(_STEADY_SHARE * gaps.max(), _STEADY_S)


def read_first_frame(data: bytes) -> ClipFacts:
    """Decodes one frame and believes the file's header about the rest.

    Raises:
        ClipError: the bytes are no video, or the first frame cannot be decoded.
    """
    with _opened(data) as (container, stream):
        shown = next(_shown_frames(container, stream))
        height, width = _upright_size(shown.image)
        fps = _stated_fps(stream)
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
        )


def transcode(data: bytes, wanted: ClipFormat, *, crf: int = 18) -> tuple[bytes, float]:
    """Decodes the wanted clip and encodes it again, as H.264 in mp4, without sound.

    Frames go from one codec to the other one by one.

    Args:
        data: A file that FFmpeg can read.
        wanted: Frames, size and rate; None keeps what the file has. A variable rate becomes steady.
        crf: Constant rate factor of x264: 0 is lossless, 18 hardly visible, 23 its default.

    Returns:
        The bytes of the new file, and its frames a second.

    Raises:
        ClipError: the bytes do not hold such a clip; says why.
    """
    if wanted.fps is None:
        wanted = replace(wanted, fps=read_facts(data).fps)
    rate = Fraction(wanted.fps or _FALLBACK_FPS).limit_denominator(1001)
    buffer = io.BytesIO()
    frames = sample_frames(data, wanted)
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": str(crf), "threads": "1"}
        )
        for number, pixels in enumerate(frames):
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
                # Colour at half the resolution, which every player reads, needs even sizes.
                even = pixels.shape[0] % 2 == 0 and pixels.shape[1] % 2 == 0
                stream.pix_fmt = "yuv420p" if even else "yuv444p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue(), float(rate)


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An open file and its main video stream; whatever FFmpeg says becomes a `ClipError`."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            # Not simply the first one: pictures of an album cover count as video streams too.
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                kinds = ", ".join(sorted({stream.type for stream in container.streams}))
                raise ClipError(ClipFault.NO_FRAMES, f"no video among the streams ({kinds})")
            if not isinstance(stream.codec_context, VideoCodecContext):  # None, against its types
                raise ClipError(ClipFault.UNDECODABLE, "a video codec that FFmpeg does not know")
            # One clip a core is faster than one clip on all cores.
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.EOFError as error:
        raise ClipError(
            ClipFault.NO_FRAMES, f"{len(data)} bytes that end before a frame"
        ) from error
    except (av.FFmpegError, ValueError) as error:
        raise ClipError(
            ClipFault.UNDECODABLE, f"{len(data)} bytes of which FFmpeg says: {_words(error)}"
        ) from error


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _shown_frames(container: InputContainer, stream: VideoStream) -> Iterator[_ShownFrame]:
    """All frames in the order in which they are shown.

    Raises:
        ClipError: there is none, one is damaged, or the time stamps make no sense.
    """
    usual_s, tick_s = 1 / _stated_fps(stream), _fraction(stream.time_base)
    waiting: av.VideoFrame | None = None
    start_s, origin = Fraction(0), 0
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise ClipError(ClipFault.UNDECODABLE, f"a damaged frame at {float(start_s):.3f} s")
        if waiting is None:
            origin = frame.pts or 0
        else:
            next_s = start_s + usual_s if frame.pts is None else (frame.pts - origin) * tick_s
            yield _ShownFrame(waiting, start_s, _plausible(next_s))
            start_s = next_s
        waiting = frame
    if waiting is None:
        raise ClipError(ClipFault.NO_FRAMES, "a video stream without a single frame")
    last_s = (waiting.duration or 0) * tick_s
    yield _ShownFrame(waiting, start_s, _plausible(start_s + (last_s or usual_s)))


def _plausible(end_s: Fraction) -> Fraction:
    if end_s > _MAX_DURATION_S:
        raise ClipError(
            ClipFault.UNDECODABLE, f"a time stamp of {float(end_s):.0f} s", "clips below a day"
        )
    return end_s


def _stated_fps(stream: VideoStream) -> Fraction:
    return _fraction(stream.average_rate) or _fraction(stream.guessed_rate) or _FALLBACK_FPS


def _fraction(number: Fraction | None) -> Fraction:
    """What is not known is None or 0/1, according to the release of PyAV."""
    return Fraction(number.numerator, number.denominator) if number else Fraction(0)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """How often a picture must be turned by 90 degrees, against the clock, to stand upright."""
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
        self._spots: dict[tuple[int, int, int], Placement] = {}

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
            interpolation="BICUBIC",
            threads=1,
        )
        pixels = np.rot90(scaled.to_ndarray(), turns)
        bottom = spot.top + (self._wanted.height or spot.scaled_height)
        right = spot.left + (self._wanted.width or spot.scaled_width)
        return np.ascontiguousarray(pixels[spot.top : bottom, spot.left : right], dtype=np.uint8)

    def _placement(self, frame: av.VideoFrame, turns: int) -> Placement:
        height, width = size = _upright_size(frame)
        self._first_size = self._first_size or size
        if self._wanted.height is None or self._wanted.width is None:
            _require_size(size, self._first_size)
            return Placement(height, width, top=0, left=0)
        wanted = (self._wanted.height, self._wanted.width)
        match self._wanted.policy:
            case FitPolicy.REFUSE:
                _require_size(size, wanted)
                return Placement(height, width, top=0, left=0)
            case FitPolicy.RESIZE:
                return Placement(*wanted, top=0, left=0)
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
