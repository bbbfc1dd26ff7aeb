"""Clips re-encoded: other frames, size or rate, in a codec that every player reads."""

import io
from dataclasses import replace
from fractions import Fraction

import av
from av.video.reformatter import VideoReformatter

from pipelines.data.clips.clip_colour import tag_as_bt709, to_bt709
from pipelines.data.clips.clip_decoding import first_frame, read_facts, sample_frames
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipFormat, ClipLimits, FitPolicy
from pipelines.data.clips.clip_stream import FALLBACK_FPS
from pipelines.media.video import REPEATABLE_X264


def transcode(
    data: bytes, wanted: ClipFormat, *, crf: int = 18, limits: ClipLimits = DEFAULT_LIMITS
) -> tuple[bytes, float]:
    """Decodes the wanted clip and encodes it again, as H.264 in mp4, without sound.

    Frames go from one codec to the other one by one. Their colours are stored and tagged as BT.709
    of limited range, which is what players assume of files without tags.

    Args:
        data: A file that FFmpeg can read.
        wanted: Frames, size and rate; None keeps what the file has. A variable rate becomes steady.
        crf: Constant rate factor of x264: 0 is lossless, 18 hardly visible, 23 its default.
        limits: What the file may ask for.

    Returns:
        The bytes of the new file, and its frames a second.

    Raises:
        ClipError: the bytes do not hold such a clip; says why.
    """
    if wanted.fps is None:
        wanted = replace(wanted, fps=read_facts(data, limits).fps)
    rate = Fraction(wanted.fps or FALLBACK_FPS).limit_denominator(1001)
    buffer, converter = io.BytesIO(), VideoReformatter()
    frames = sample_frames(data, wanted, limits)
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=rate, options=REPEATABLE_X264 | {"crf": str(crf)}
        )
        for number, pixels in enumerate(frames):
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
                # Colour at half the resolution, which every player reads, needs even sizes.
                even = pixels.shape[0] % 2 == 0 and pixels.shape[1] % 2 == 0
                stream.pix_fmt = "yuv420p" if even else "yuv444p"
                tag_as_bt709(stream)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(to_bt709(frame, stream.pix_fmt, converter)))
        container.mux(stream.encode())
    return buffer.getvalue(), float(rate)


def shrink_video(data: bytes, width_px: int, crf: int) -> bytes:
    """Re-encodes a video file, smaller.

    Args:
        data: A file that FFmpeg can read.
        width_px: Width to shrink to; a narrower video keeps its size.
        crf: See `transcode`.

    Raises:
        ClipError: the bytes are not a video; says why.
    """
    height, width = first_frame(data).shape[:2]
    width_px = min(width, width_px) // 2 * 2
    height_px = max(2, round(height * width_px / width / 2) * 2)
    wanted = ClipFormat(height=height_px, width=width_px, policy=FitPolicy.RESIZE)
    return transcode(data, wanted, crf=crf)[0]
