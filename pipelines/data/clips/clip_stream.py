"""A video file as a stream of shown frames, within the bounds that one clip has to keep."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.clip_format import ClipLimits
from pipelines.data.clips.hang_guard import guarded, progress

FALLBACK_FPS = Fraction(25)
_MAX_DURATION_S = 24 * 3600
_PADDING_PIXELS = 2**20
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """A frame and the time during which it is shown; the first one starts at 0."""

    image: av.VideoFrame
    start_s: Fraction
    end_s: Fraction


@contextmanager
def opened(
    data: bytes, limits: ClipLimits, *, whole: bool
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An open file and its main video stream.

    Args:
        data: The file.
        limits: What it may ask for; pixels are checked before a frame is decoded.
        whole: All of it is wanted: refuse a header that states too many frames or seconds.

    Raises:
        ClipError: instead of whatever FFmpeg raises; a bound is passed.
    """
    # The decoder itself must not make a much larger frame than the header states; it counts padding
    # too, so the exact bound is checked below. A playlist must not open other files or addresses.
    options = {"max_pixels": str(4 * limits.max_pixels + _PADDING_PIXELS)}
    only_these_bytes = {"protocol_whitelist": "none"}
    try:
        with (
            guarded(),
            av.open(
                io.BytesIO(data), "r", options=options, container_options=only_these_bytes
            ) as container,
        ):
            stream = _main_stream(container)
            _check_header(container, stream, limits, whole=whole)
            # One clip a core is faster than one clip on all cores.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = options
            yield container, stream
    except ClipError:
        raise
    except av.EOFError as error:
        raise ClipError(
            ClipFault.NO_FRAMES, f"{len(data)} bytes that end before a frame"
        ) from error
    except Exception as error:  # Broken bytes raise whatever a codec or PyAV makes of them.
        raise ClipError(
            ClipFault.UNDECODABLE, f"{len(data)} bytes of which FFmpeg says: {_words(error)}"
        ) from error


def _main_stream(container: InputContainer) -> VideoStream:
    """The video that a player would show: not the first one, and not the picture of a cover."""
    videos = [one for one in container.streams.video if not one.disposition & _COVERS]
    stream = container.streams.best("video")
    if stream not in videos:
        stream = videos[0] if videos else None
    if not isinstance(stream, VideoStream):
        kinds = sorted({one.type for one in container.streams})
        covers = "; its only picture is a cover" if container.streams.video else ""
        raise ClipError(
            ClipFault.NO_FRAMES, f"no video among the streams ({', '.join(kinds)}){covers}"
        )
    if not isinstance(cast("object", stream.codec_context), av.VideoCodecContext):
        raise ClipError(ClipFault.UNDECODABLE, "a video codec that this FFmpeg does not know")
    return stream


def _check_header(
    container: InputContainer, stream: VideoStream, limits: ClipLimits, *, whole: bool
) -> None:
    context = stream.codec_context
    check_pixels(context.height, context.width, limits)
    if whole:
        duration_s = max(
            Fraction(container.duration or 0, av.time_base),
            (stream.duration or 0) * fraction(stream.time_base),
        )
        _check_length(stream.frames, duration_s, limits)


def check_pixels(height: int, width: int, limits: ClipLimits) -> None:
    """Raises `ClipError` where a picture is larger than allowed."""
    if height * width > limits.max_pixels:
        raise ClipError(
            ClipFault.TOO_MANY_PIXELS,
            f"pictures of {height}x{width} (height x width), {height * width} pixels",
            f"at most {limits.max_pixels} (max_pixels, --max-pixels)",
        )


def _check_length(num_frames: int, duration_s: Fraction, limits: ClipLimits) -> None:
    if num_frames > limits.max_frames:
        raise ClipError(
            ClipFault.TOO_MANY_FRAMES,
            f"{num_frames} frames or more",
            f"at most {limits.max_frames} (max_frames, --max-frames)",
        )
    if duration_s > limits.max_seconds:
        raise ClipError(
            ClipFault.TOO_LONG,
            f"{float(duration_s):.3f} s of video or more",
            f"at most {limits.max_seconds:g} s (max_seconds, --max-seconds)",
        )


def _words(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return said if isinstance(error, av.FFmpegError) else f"{type(error).__name__}: {said}"


def shown_frames(
    container: InputContainer, stream: VideoStream, limits: ClipLimits
) -> Iterator[ShownFrame]:
    """All frames in the order in which they are shown.

    Raises:
        ClipError: there is none, one is damaged, the time stamps make no sense, or a bound is
            passed.
    """
    usual_s, tick_s = 1 / stated_fps(stream), fraction(stream.time_base)
    give_up_s = time.monotonic() + limits.max_decode_s
    waiting: av.VideoFrame | None = None
    start_s, origin = Fraction(0), 0
    for number, frame in enumerate(container.decode(stream)):
        progress()
        if frame.is_corrupt:
            raise ClipError(ClipFault.UNDECODABLE, f"a damaged frame at {float(start_s):.3f} s")
        check_pixels(frame.height, frame.width, limits)
        _check_length(number + 1, start_s, limits)
        if time.monotonic() > give_up_s:
            raise ClipError(
                ClipFault.TOO_SLOW,
                f"{number} frames decoded in {limits.max_decode_s:g} s, and no end",
                f"at most {limits.max_decode_s:g} s (max_decode_s, --max-decode-seconds)",
            )
        if waiting is None:
            origin = frame.pts or 0
        else:
            next_s = start_s + usual_s if frame.pts is None else (frame.pts - origin) * tick_s
            yield ShownFrame(waiting, start_s, _plausible(next_s))
            start_s = next_s
        waiting = frame
    if waiting is None:
        raise ClipError(ClipFault.NO_FRAMES, "a video stream without a single frame")
    last_s = (waiting.duration or 0) * tick_s
    _check_length(0, start_s + (last_s or usual_s), limits)
    yield ShownFrame(waiting, start_s, _plausible(start_s + (last_s or usual_s)))


def _plausible(end_s: Fraction) -> Fraction:
    if end_s > _MAX_DURATION_S:
        raise ClipError(
            ClipFault.UNDECODABLE, f"a time stamp of {float(end_s):.0f} s", "clips below a day"
        )
    return end_s


def stated_fps(stream: VideoStream) -> Fraction:
    """Frames a second as the header has it."""
    return fraction(stream.average_rate) or fraction(stream.guessed_rate) or FALLBACK_FPS


def fraction(number: Fraction | None) -> Fraction:
    """Returns None for an unknown fraction, which is None or 0/1 by the release of PyAV."""
    return Fraction(number.numerator, number.denominator) if number else Fraction(0)
